#!/usr/bin/env bash
# What action.yml runs: install gemma2tool unless told not to, run one command, and pass its exit code on.
# Everything comes by environment variables; arguments are split at line ends only and never evaluated.
set -euo pipefail

case "$G2T_COMMAND" in
  convert | quantize | verify) ;;
  *) printf 'command: %q is none of convert, quantize, verify\n' "$G2T_COMMAND" >&2; exit 2 ;;
esac

lines() { # the lines of $1 that are not empty, into the array "found"
  found=()
  local line
  while IFS= read -r line || [ -n "$line" ]; do
    line="${line%$'\r'}"
    if [ -n "$line" ]; then found+=("$line"); fi
  done <<<"$1"
}

if [ "${G2T_INSTALL:-}" != no ]; then
  lines "${G2T_INSTALL:-}"
  python -m pip install --disable-pip-version-check ${found[@]+"${found[@]}"} "$G2T_HOME"
fi

lines "$G2T_ARGUMENTS"
arguments=(${found[@]+"${found[@]}"})
if [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then arguments+=(--summary "$GITHUB_STEP_SUMMARY"); fi
if [ -n "${G2T_HTML:-}" ]; then arguments+=(--html "$G2T_HTML"); fi
if [ -n "${G2T_JUNIT:-}" ]; then arguments+=(--junit "$G2T_JUNIT"); fi

code=0
gemma2tool "$G2T_COMMAND" "${arguments[@]}" || code=$?
if [ -n "${GITHUB_OUTPUT:-}" ]; then echo "exit-code=$code" >>"$GITHUB_OUTPUT"; fi
exit "$code"
