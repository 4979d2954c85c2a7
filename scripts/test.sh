#!/usr/bin/env bash
# Install the package with its test extra into .venv and run the tests. Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE  # the tests start many processes, which would all compile the package
bash scripts/setup.sh test
exec .venv/bin/python -m pytest -q -n 2 --dist worksteal "$@"
