"""Quantization rates of gemma2tool over ggml's, by GGUF type, on one core in one run.

    python benchmarks/kernels.py [--types Q4_K,Q6_K] [--instruction-set avx2] [--values 2e6] [--json FILE]

Both take the same float32 rows from memory and write their codes to memory, alternating, on one thread pinned to one
core. Rates are of the median processor time. ggml's side is ggml_quantize_chunk of the xllamacpp wheel. Exits with 1 if
codes differ or a goal is missed: a geometric mean of 5 over the K-quants and IQ4 types with and without importance
matrix, none of them below 2, and Q8_0 and Q4_0 not below 1. ``--no-goals`` checks the codes alone, for runs too short
to time.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from processes import argument_parser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gemma2tool.quantizers import kernels
from gemma2tool.quantizers.gguf_types import GGUF_TYPES, dequantize, quantize
from tests.support import llama_peer

COLUMNS = 2304  # a row of the 2B model
SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
"""Types whose scales are searched for."""
MEMORY_BOUND = ("Q8_0", "Q4_0")


@dataclass(frozen=True)
class Rate:
    """Millions of weights a second."""

    type: str
    importance: bool
    gemma2tool: float
    ggml: float
    dequantize_gemma2tool: float
    dequantize_ggml: float
    identical: bool

    @property
    def ratio(self) -> float:
        return self.gemma2tool / self.ggml

    @property
    def name(self) -> str:
        return f"{self.type} {'with' if self.importance else 'without'} importance"


def measure(type: str, with_importance: bool, values: int = 2_000_000, repeats: int = 5) -> Rate:
    """The rates of one type on normal weights; ``values`` is divided by 8 for types that ggml quantizes slowly."""
    row = GGUF_TYPES[type]
    rng = np.random.default_rng(0)
    is_slow = row.needs_importance or type.startswith(("IQ", "Q2_K"))
    rows = max(1, int(values / (8 if is_slow else 1)) // COLUMNS)
    x = (rng.standard_normal((rows, COLUMNS)) * 0.02).astype(np.float32)
    importance = (rng.standard_normal(COLUMNS) ** 2 + 1e-3).astype(np.float32) if with_importance else None
    codes = quantize(type, x, importance)  # also warms up both sides
    expected = llama_peer.quantize(type, x, importance)
    floats = np.empty_like(x)
    millions = x.size / 1e6
    seconds, ggml_seconds = alternating_seconds(
        lambda: quantize(type, x, importance, out=codes),
        lambda: llama_peer.quantize(type, x, importance, expected),
        repeats,
    )
    dequantize_seconds, ggml_dequantize_seconds = alternating_seconds(
        lambda: dequantize(type, codes, COLUMNS, floats),
        lambda: llama_peer.dequantize(type, codes, COLUMNS, floats),
        repeats,
    )
    return Rate(
        type,
        with_importance,
        gemma2tool=millions / seconds,
        ggml=millions / ggml_seconds,
        dequantize_gemma2tool=millions / dequantize_seconds,
        dequantize_ggml=millions / ggml_dequantize_seconds,
        identical=np.array_equal(codes, expected),
    )


def alternating_seconds(a: Callable[[], object], b: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median processor seconds of both functions, called in turn; processor time leaves out other programs on this
    core.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for call, times in zip((a, b), seconds, strict=True):
            start = time.thread_time()
            call()
            times.append(time.thread_time() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def missed_goals(rates: list[Rate]) -> list[str]:
    """The goals that ``rates`` miss, a line for each."""
    searched = [rate for rate in rates if rate.type in SEARCHED]
    missed = [f"{rate.name}: {rate.ratio:.2f} times ggml, below 2" for rate in searched if rate.ratio < 2]
    missed += [
        f"{rate.name}: {rate.ratio:.2f} times ggml, below 1"
        for rate in rates
        if rate.type in MEMORY_BOUND and not rate.importance and rate.ratio < 1
    ]
    if {rate.type for rate in searched} == set(SEARCHED) and geometric_mean(searched) < 5:
        missed.append(f"geometric mean {geometric_mean(searched):.2f}, below 5")
    return missed


def geometric_mean(rates: list[Rate]) -> float:
    return statistics.geometric_mean(rate.ratio for rate in rates)


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--types", default=",".join(name for name in GGUF_TYPES if name != "F32"))
    parser.add_argument("--instruction-set", choices=kernels.available_instruction_sets())
    parser.add_argument("--values", type=float, default=2e6, help="weights per measurement")
    parser.add_argument("--json", type=Path, help="also write the rates here")
    parser.add_argument("--no-goals", action="store_true", help="do not fail on a missed goal")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if arguments.instruction_set:
        kernels.use_instruction_set(arguments.instruction_set)
    print(f"instruction set {kernels.current_instruction_set()}; millions of weights a second, one core")
    print(f"{'type':8} {'matrix':6} {'gemma2tool':>10} {'ggml':>8} {'ratio':>7}   {'back: gemma2tool':>16} {'ggml':>8}")
    rates = []
    for type in arguments.types.split(","):
        row = GGUF_TYPES[type]
        for importance in [False] * (not row.needs_importance) + [True] * row.takes_importance:
            rate = measure(type, importance, int(arguments.values))
            rates.append(rate)
            print(
                f"{type:8} {'yes' if importance else 'no':6}"
                f" {rate.gemma2tool:10.1f} {rate.ggml:8.1f} {rate.ratio:6.2f}x  "
                f" {rate.dequantize_gemma2tool:16.0f} {rate.dequantize_ggml:8.0f}"
                f"{'' if rate.identical else '  CODES DIFFER'}",
                flush=True,
            )
    searched = [rate for rate in rates if rate.type in SEARCHED]
    if searched:
        lowest = min(rate.ratio for rate in searched)
        print(f"K-quants and IQ4: geometric mean {geometric_mean(searched):.2f}x, lowest {lowest:.2f}x")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(rate) | {"ratio": rate.ratio} for rate in rates], indent=1))
    different = [f"{rate.name}: codes differ from ggml's" for rate in rates if not rate.identical]
    missed = different + ([] if arguments.no_goals else missed_goals(rates))
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
