#!/usr/bin/env bash
# Builds the GGUF kernels for AArch64 (NEON) and compares their bytes, run by an emulator, with this machine's.
# Debian: apt-get install g++-aarch64-linux-gnu qemu-user. Takes some minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
kernels=gemma2tool/quantizers/kernels build=build/emulated
mkdir -p "$build"
options=(-O2 -DNDEBUG -std=gnu++17 -ffp-contract=off -fno-math-errno -fno-trapping-math -I"$kernels")
objects=()
for source in legacy k_minimum k_signed iq4 simple iq3 iq2 iq1; do
  aarch64-linux-gnu-g++ "${options[@]}" -DKERNELS_ISA=baseline -c "$kernels/gguf_$source.cpp" -o "$build/$source.o"
  objects+=("$build/$source.o")
done
aarch64-linux-gnu-g++ "${options[@]}" -static scripts/emulated/kernels.cpp "$kernels/gguf_grids.cpp" "${objects[@]}" -o "$build/kernels"
exec "${PYTHON:-python3}" scripts/emulated/compare.py qemu-aarch64 "$build/kernels"
