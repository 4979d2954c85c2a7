#!/usr/bin/env bash
# Create or update .venv with the package in editable mode, at the versions of constraints.txt. $1: extras, separated by commas.
#   scripts/setup.sh             the tool
#   scripts/setup.sh test        and what the tests need
#   scripts/setup.sh test,dev    and what scripts/check.sh needs
# Linux and macOS. Needs Python 3.11 or newer and a C++17 compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
[ -x .venv/bin/python ] || "$python" -m venv .venv
extras="${1:+[$1]}"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".${extras}"
# keras-hub and gemma ask for tensorflow, which the tests do not need: keras-hub runs on torch, and of gemma only the model is used.
case ",${1:-}," in
  *,test,*) .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps keras-hub gemma ;;
esac
