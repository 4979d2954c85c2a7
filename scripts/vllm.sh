#!/usr/bin/env bash
# Serve what gemma2tool writes with vLLM, type by type, and compare each with its file by 'gemma2tool verify --server'.
#   scripts/vllm.sh                  the model of fixtures/, in every type that vLLM loads
#   scripts/vllm.sh SOURCE TYPE...   another source, these types
# Needs the commands vllm (pip install vllm; a GPU, or vLLM's build for CPUs), gemma2tool and curl. PORT: default 8199.
# The exit code is 1 if a type does not load or differs; the logs are then kept.
set -uo pipefail
cd "$(dirname "$0")/.."
source="${1:-fixtures/tiny-gemma2/model.ckpt}"
shift || true
types=("$@")
[ $# -gt 0 ] || types=(bf16 w4a16 w4a16-asym w8a16 w8a8-int8 fp8-dynamic fp8-block nvfp4a16 gptq-4 gptq-8 awq-4 nf4)
port="${PORT:-8199}"
folder="$(mktemp -d)"
failed=()

for type in "${types[@]}"; do
  model="$folder/$type"
  if [ "$type" = bf16 ]; then
    gemma2tool convert "$source" "$model" --to hf --dtype bf16 --no-verify --quiet || exit
  else
    gemma2tool quantize "$source" "$model" --to hf --type "$type" --no-verify --quiet || exit
  fi
  echo "== $type"
  # The likeliest tokens' probabilities before any sampling setting, of as many tokens as verify asks for.
  vllm serve "$model" --port "$port" --max-model-len 256 --enforce-eager --max-logprobs 20 >"$folder/$type.log" 2>&1 &
  server=$!
  for _ in $(seq 300); do
    curl --silent --fail --output /dev/null "http://127.0.0.1:$port/health" && break
    kill -0 "$server" 2>/dev/null || break
    sleep 1
  done
  if kill -0 "$server" 2>/dev/null; then
    gemma2tool verify "$model" --server "http://127.0.0.1:$port" || failed+=("$type")
    kill "$server"
  else
    tail -n 5 "$folder/$type.log"
    failed+=("$type")
  fi
  wait "$server" 2>/dev/null
done

if [ ${#failed[@]} -gt 0 ]; then
  echo "not as it should be: ${failed[*]}; logs in $folder" >&2
  exit 1
fi
rm -r "$folder"
