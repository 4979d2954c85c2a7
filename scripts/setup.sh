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
# keras-hub asks for tensorflow; the tests run it on torch, which is there.
case ",${1:-}," in
  *,test,*) .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps keras-hub ;;
esac
