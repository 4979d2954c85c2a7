#!/usr/bin/env bash
# Run every path that takes --device on a GPU and compare with the CPU's answers; prints a table. Needs torch with CUDA and the
# build tools (scikit-build-core, nanobind, cmake, ninja) in the environment of $PYTHON; nothing is downloaded.
#   scripts/gpu.sh [--size 2b|tiny]
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
"$python" -m pip install --quiet --no-build-isolation --no-deps --upgrade --target build/gpu .
PYTHONPATH="$PWD/build/gpu" exec "$python" scripts/gpu.py "$@"
