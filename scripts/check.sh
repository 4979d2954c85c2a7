#!/usr/bin/env bash
# What continuous integration runs: lint, formatting, types, the documentation and, by scripts/test.sh, the tests. Arguments go to pytest:
#   scripts/check.sh                  everything
#   scripts/check.sh -m "not slow"    the quick run
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh test,dev
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy
NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --quiet --strict --site-dir build/site
exec bash scripts/test.sh "$@"
