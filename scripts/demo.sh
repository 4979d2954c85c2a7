#!/usr/bin/env bash
# Install the package into .venv, then convert, quantize and verify the small trained Gemma 2 in fixtures/, into out/.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
gemma2tool=.venv/bin/gemma2tool
source=fixtures/tiny-gemma2/model.ckpt
rm -rf out && mkdir out

step() { printf '\n\033[1m$ gemma2tool %s\033[0m\n' "$*"; "$gemma2tool" "$@"; }
step convert  "$source" out/hf
step convert  out/hf out/model-bf16.gguf
step quantize "$source" out/model-q8_0.gguf --type q8_0
step quantize "$source" out/nf4 --type nf4
step quantize "$source" out/int8 --type int8
step inspect  out/nf4
ls -l out
step verify   out/model-q8_0.gguf --reference "$source" --tokens fixtures/tiny-gemma2/heldout.npy
