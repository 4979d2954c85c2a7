"""Compares the GGUF kernels with ggml at length: every type, every instruction set, millions of values.

    python tests/campaigns/gguf_kernels.py [--values 10e6] [--types Q4_K,Q6_K]

For each type and each kind of importance weights it quantizes `values` floats of all kinds (normal, heavy-tailed,
bf16-rounded, constant, zero, denormal, ...) with ggml_quantize_chunk and with gemma2tool's kernels in every instruction
set of this machine, and compares all bytes; then it compares the floats that both decode from them. Prints a line per
type and weights; exits with 1 on any difference.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gemma2tool.quantizers import kernels
from gemma2tool.quantizers.gguf_types import GGUF_TYPES, dequantize, quantize
from tests.support import kernel_data, llama_peer

COLS = 2048


def compare(type: str, weights: str, values: int, seed: int) -> tuple[int, int, int]:
    """Values quantized, differing bytes over all instruction sets, and decoded floats that differ."""
    per_kind = -(-values // (COLS * len(kernel_data.ROWS)))
    total = wrong_bytes = wrong_floats = 0
    for number, kind in enumerate(kernel_data.ROWS):
        x = kernel_data.rows(kind, seed + number, per_kind, COLS)
        importance = kernel_data.importance(weights, seed + number, COLS)
        expected = llama_peer.quantize(type, x, importance)
        floats = llama_peer.dequantize(type, expected, COLS)
        total += x.size
        for isa in kernels.available_instruction_sets():
            kernels.use_instruction_set(isa)
            wrong_bytes += int((quantize(type, x, importance) != expected).sum())
            wrong_floats += int((dequantize(type, expected, COLS).view(np.uint32) != floats.view(np.uint32)).sum())
    return total, wrong_bytes, wrong_floats


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=float, default=10e6, help="floats per type and kind of weights")
    parser.add_argument("--types", default=",".join(n for n, r in GGUF_TYPES.items() if n != "F32"))
    parser.add_argument("--seed", type=int, default=1000)
    arguments = parser.parse_args()
    print(f"instruction sets: {', '.join(kernels.available_instruction_sets())}")
    failures = 0
    for type in arguments.types.split(","):
        for weights in kernel_data.weight_kinds(GGUF_TYPES[type]):
            start = time.perf_counter()
            total, wrong_bytes, wrong_floats = compare(type, weights, int(arguments.values), arguments.seed)
            failures += wrong_bytes + wrong_floats
            print(
                f"{type:8} importance {weights:8} {total:>11,} values: {wrong_bytes} bytes differ, "
                f"{wrong_floats} floats differ  ({time.perf_counter() - start:.0f} s)",
                flush=True,
            )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
