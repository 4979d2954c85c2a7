#!/usr/bin/env bash
# Build the container image gemma2tool:VERSION with the first builder there is, and run it once. Arguments go to the builder:
#   scripts/image.sh --build-arg TORCH_INDEX=URL    torch from this index (the CPU build's: pytorch.org/get-started/locally)
set -euo pipefail
cd "$(dirname "$0")/.."
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' gemma2tool/version.py)
for builder in docker podman buildah; do
  if command -v "$builder" >/dev/null && "$builder" info >/dev/null 2>&1; then
    "$builder" build --tag "gemma2tool:$version" "$@" .
    [ "$builder" = buildah ] || "$builder" run --rm "gemma2tool:$version" doctor
    exit
  fi
done
echo "no container builder answers: install and start docker, podman or buildah" >&2
exit 1
