#!/usr/bin/env bash
# Run every path that takes --device on a GPU and compare with the CPU's answers, and with transformers, bitsandbytes and
# llm-compressor where they are installed; prints a table. Needs torch with CUDA and, unless gemma2tool is installed for
# $PYTHON, the build tools (scikit-build-core, nanobind, cmake, ninja); nothing is downloaded.
#   scripts/gpu.sh [--size 2b|tiny] [--device cuda|cpu] [--only SECTION,...]
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
if ! (cd /; "$python" -c "import gemma2tool.quantizers.kernels._native") 2>/dev/null; then
  "$python" -m pip install --quiet --no-build-isolation --no-deps --upgrade --target build/gpu .
  export PYTHONPATH="$PWD/build/gpu${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$python" scripts/gpu "$@"
