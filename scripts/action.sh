#!/usr/bin/env bash
# What action.yml runs: install gemma2tool unless G2T_INSTALL is "no", run one command, and pass its exit code on.
# Input comes from environment variables. Arguments are split at line ends only and never evaluated.
set -euo pipefail

case "$G2T_COMMAND" in
  convert | quantize | verify) ;;
  *) printf 'command: %q is not one of convert, quantize, verify\n' "$G2T_COMMAND" >&2; exit 2 ;;
esac

split_lines() { # put the lines of $1 that are not empty into the array "lines"
  lines=()
  local line
  while IFS= read -r line || [ -n "$line" ]; do
    line="${line%$'\r'}"
    if [ -n "$line" ]; then lines+=("$line"); fi
  done <<<"$1"
}

if [ "${G2T_INSTALL:-}" != no ]; then
  split_lines "${G2T_INSTALL:-}"
  python -m pip install --disable-pip-version-check ${lines[@]+"${lines[@]}"} "$G2T_HOME"
fi

split_lines "$G2T_ARGUMENTS"
arguments=(${lines[@]+"${lines[@]}"})
if [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then arguments+=(--summary "$GITHUB_STEP_SUMMARY"); fi
if [ -n "${G2T_HTML:-}" ]; then arguments+=(--html "$G2T_HTML"); fi
if [ -n "${G2T_JUNIT:-}" ]; then arguments+=(--junit "$G2T_JUNIT"); fi

# The runner takes commands from anything that is printed, also in the middle of a line (##[...]), and a file's name or
# a token can hold them. It is told to stop until it reads a word that nobody can guess; annotations follow after that.
export GEMMA2TOOL_ANNOTATIONS
GEMMA2TOOL_ANNOTATIONS="$(mktemp)"
fence="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
code=0
echo "::stop-commands::$fence"
gemma2tool "$G2T_COMMAND" "${arguments[@]}" 2>&1 || code=$?
echo
echo "::$fence::"
cat "$GEMMA2TOOL_ANNOTATIONS"
rm -f "$GEMMA2TOOL_ANNOTATIONS"
if [ -n "${GITHUB_OUTPUT:-}" ]; then echo "exit-code=$code" >>"$GITHUB_OUTPUT"; fi
exit "$code"
