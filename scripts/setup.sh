#!/usr/bin/env bash
# Make (or reuse) .venv with the package and what "$@" names as extras, at the versions of constraints.txt.
#   scripts/setup.sh          the tool alone
#   scripts/setup.sh test     and what its tests need
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
[ -x .venv/bin/python ] || "$python" -m venv .venv
extras="${1:+[$1]}"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".${extras}"
# keras-hub and Google DeepMind's gemma ask for tensorflow, which the tests need of neither: one runs on torch, of the other its model alone.
case ",${1:-}," in
  *,test,*) .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps keras-hub gemma ;;
esac
