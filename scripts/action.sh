#!/usr/bin/env bash
# What action.yml runs. Input comes from environment variables. Arguments are split at line ends only and never evaluated.
#   scripts/action.sh place   say where gemma2tool is installed, and by which key an earlier run has kept it
#   scripts/action.sh run     install it there, unless it is there or G2T_INSTALL is "no", run one command, and pass its
#                             exit code on
set -euo pipefail

place="${RUNNER_TEMP:-${HOME:-$PWD}/.cache}/gemma2tool"

split_lines() { # put the lines of $1 that are not empty into the array "lines"
  lines=()
  local line
  while IFS= read -r line || [ -n "$line" ]; do
    line="${line%$'\r'}"
    if [ -n "$line" ]; then lines+=("$line"); fi
  done <<<"$1"
}

output() { # set the output $1 of the step to $2
  if [ -n "${GITHUB_OUTPUT:-}" ]; then echo "$1=$2" >>"$GITHUB_OUTPUT"; fi
}

key() { # what the installation is made from: machine, Python, sources, options
  python - "$G2T_HOME" "${G2T_INSTALL:-}" <<'PYTHON'
import hashlib, pathlib, platform, sys
home, options = pathlib.Path(sys.argv[1]), sys.argv[2]
files = [home / "pyproject.toml", home / "CMakeLists.txt", *sorted((home / "gemma2tool").rglob("*"))]
digest = hashlib.sha256(f"{sys.executable}\n{options}\n".encode())
for file in files:
    if file.is_file() and file.suffix not in (".pyc", ".so"):
        digest.update(f"{file.relative_to(home)}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
version = "".join(platform.python_version_tuple()[:2])
print(f"gemma2tool-{platform.system()}-{platform.machine()}-python{version}-{digest.hexdigest()[:32]}".lower())
PYTHON
}

install() { # make the installation of the key $1; only a complete one has a file "key"
  rm -rf "$place"
  python -m venv "$place"
  local pip=("$place/bin/python" -m pip install --disable-pip-version-check --no-input)
  split_lines "${G2T_INSTALL:-}"
  if [ ${#lines[@]} -eq 0 ] && [ "$(uname -s)" = Linux ]; then # elsewhere there is no build for CUDA
    "${pip[@]}" --index-url https://download.pytorch.org/whl/cpu torch
  fi
  "${pip[@]}" ${lines[@]+"${lines[@]}"} "$G2T_HOME"
  mkdir "$place/command" # what later steps find, and not this Python
  ln -s ../bin/gemma2tool "$place/command/gemma2tool"
  echo "$1" >"$place/key"
}

if [ "${1:-}" = install ]; then # in a shell of its own, which ends at the first command that fails
  install "$2"
  exit
fi

if [ "${1:-}" = place ]; then
  output path "$place"
  if [ "${G2T_INSTALL:-}" != no ]; then output key "$(key)"; fi
  exit
fi

case "$G2T_COMMAND" in
  convert | quantize | verify) ;;
  *) printf 'command: %q is not one of convert, quantize, verify\n' "$G2T_COMMAND" >&2; output exit-code 2; exit 2 ;;
esac

if [ "${G2T_INSTALL:-}" != no ]; then
  wanted="$(key)"
  if [ "$(cat "$place/key" 2>/dev/null || true)" != "$wanted" ]; then
    bash "${BASH_SOURCE[0]}" install "$wanted" || { echo "gemma2tool could not be installed" >&2; output exit-code 4; exit 4; }
  fi
  export PATH="$place/command:$PATH"
  if [ -n "${GITHUB_PATH:-}" ]; then echo "$place/command" >>"$GITHUB_PATH"; fi
fi

split_lines "$G2T_ARGUMENTS"
arguments=(${lines[@]+"${lines[@]}"})
if [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then arguments+=(--summary "$GITHUB_STEP_SUMMARY"); fi
if [ -n "${G2T_HTML:-}" ]; then arguments+=(--html "$G2T_HTML"); fi
if [ -n "${G2T_JUNIT:-}" ]; then arguments+=(--junit "$G2T_JUNIT"); fi
if [ -n "${G2T_JSON:-}" ]; then arguments+=(--json); fi

# The runner takes commands from anything that is printed, also in the middle of a line (##[...]), and a file's name or
# a token can hold them. It is told to stop until it reads a word that nobody can guess; annotations follow after that.
export GEMMA2TOOL_ANNOTATIONS
GEMMA2TOOL_ANNOTATIONS="$(mktemp)"
fence="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
code=0
echo "::stop-commands::$fence"
if [ -n "${G2T_JSON:-}" ]; then # messages to the log, the document to the file
  gemma2tool "$G2T_COMMAND" "${arguments[@]}" 2>&1 >"$G2T_JSON" || code=$?
else
  gemma2tool "$G2T_COMMAND" "${arguments[@]}" 2>&1 || code=$?
fi
echo
echo "::$fence::"
cat "$GEMMA2TOOL_ANNOTATIONS"
rm -f "$GEMMA2TOOL_ANNOTATIONS"
output exit-code "$code"
exit "$code"
