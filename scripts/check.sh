#!/usr/bin/env bash
# What continuous integration runs: lint, formatting, types and tests, in .venv. Arguments are passed to pytest:
#   scripts/check.sh                  everything
#   scripts/check.sh -m "not slow"    the quick run
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh test,dev
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy
exec .venv/bin/python -m pytest -q -n 2 "$@"
