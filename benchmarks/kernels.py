"""Our quantization rate over ggml's, per GGUF type, on one core in one run.

    python benchmarks/kernels.py [--types Q4_K,Q6_K] [--instruction-set avx2] [--values 2e6] [--json FILE]

Both sides take the same float32 rows from memory and write their codes to memory, by turns, on one thread pinned to one core; rates
are of the median processor time. ggml's side is ggml_quantize_chunk of the xllamacpp wheel. Exits with 1 when a goal is missed: a geometric
mean of 5 over the K-quants and IQ4 types with and without importance matrix, none of them below 2, and Q8_0 and Q4_0 not below 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from gemma2tool.quantizers import kernels
from gemma2tool.quantizers.gguf_types import GGUF_TYPES, dequantize, quantize
from tests.support import llama_peer

COLS = 2304  # a row of the 2B model
SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
MEMORY_BOUND = ("Q8_0", "Q4_0")


@dataclass(frozen=True)
class Rate:
    """Millions of weights a second."""

    type: str
    importance: bool
    ours: float
    ggml: float
    dequantize_ours: float
    dequantize_ggml: float
    identical: bool

    @property
    def ratio(self) -> float:
        return self.ours / self.ggml


def measure(type: str, with_importance: bool, values: int = 2_000_000, repeats: int = 5) -> Rate:
    """The rates of one type on normal weights; ``values`` is cut for types that ggml does slowly."""
    row = GGUF_TYPES[type]
    rng = np.random.default_rng(0)
    slow = row.needs_importance or type.startswith(("IQ", "Q2_K"))
    n = max(1, int(values / (8 if slow else 1)) // COLS)
    x = (rng.standard_normal((n, COLS)) * 0.02).astype(np.float32)
    importance = (rng.standard_normal(COLS) ** 2 + 1e-3).astype(np.float32) if with_importance else None
    codes = quantize(type, x, importance)  # also warms up both sides
    want = llama_peer.quantize(type, x, importance)
    floats = np.empty_like(x)
    ours, theirs = _by_turns(
        lambda: quantize(type, x, importance, out=codes),
        lambda: llama_peer.quantize(type, x, importance, want),
        repeats,
    )
    back_ours, back_theirs = _by_turns(
        lambda: dequantize(type, codes, COLS, floats), lambda: llama_peer.dequantize(type, codes, COLS, floats), repeats
    )
    mega = x.size / 1e6
    return Rate(
        type,
        with_importance,
        mega / ours,
        mega / theirs,
        mega / back_ours,
        mega / back_theirs,
        np.array_equal(codes, want),
    )


def _by_turns(a: Callable[[], object], b: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median processor seconds of each: what other programs take from this core does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for call, times in zip((a, b), seconds, strict=True):
            start = time.thread_time()
            call()
            times.append(time.thread_time() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def missed_goals(rates: list[Rate]) -> list[str]:
    """The goals that ``rates`` miss, in words."""
    missed = [f"{r.type}: codes differ from ggml's" for r in rates if not r.identical]
    searched = [r for r in rates if r.type in SEARCHED]
    missed += [f"{_name(r)}: {r.ratio:.2f} times ggml, below 2" for r in searched if r.ratio < 2]
    missed += [
        f"{_name(r)}: {r.ratio:.2f} times ggml, below 1"
        for r in rates
        if r.type in MEMORY_BOUND and not r.importance and r.ratio < 1
    ]
    if {r.type for r in searched} == set(SEARCHED) and geometric_mean(searched) < 5:
        missed.append(f"geometric mean {geometric_mean(searched):.2f}, below 5")
    return missed


def geometric_mean(rates: list[Rate]) -> float:
    return statistics.geometric_mean(r.ratio for r in rates)


def _name(rate: Rate) -> str:
    return f"{rate.type} {'with' if rate.importance else 'without'} importance"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(n for n, r in GGUF_TYPES.items() if n != "F32"))
    parser.add_argument("--instruction-set", choices=kernels.available_instruction_sets())
    parser.add_argument("--values", type=float, default=2e6, help="weights per measurement")
    parser.add_argument("--json", type=Path, help="also write the rates here")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if arguments.instruction_set:
        kernels.use_instruction_set(arguments.instruction_set)
    print(f"instruction set {kernels.current_instruction_set()}; millions of weights a second, one core")
    print(f"{'type':8} {'matrix':6} {'ours':>8} {'ggml':>8} {'ratio':>7}   {'back: ours':>10} {'ggml':>8}")
    rates = []
    for type in arguments.types.split(","):
        row = GGUF_TYPES[type]
        for importance in [False] * (not row.needs_importance) + [True] * row.takes_importance:
            r = measure(type, importance, int(arguments.values))
            rates.append(r)
            print(
                f"{type:8} {'yes' if importance else 'no':6} {r.ours:8.1f} {r.ggml:8.1f} {r.ratio:6.2f}x   "
                f"{r.dequantize_ours:10.0f} {r.dequantize_ggml:8.0f}{'' if r.identical else '  CODES DIFFER'}",
                flush=True,
            )
    searched = [r for r in rates if r.type in SEARCHED]
    if searched:
        print(
            f"K-quants and IQ4: geometric mean {geometric_mean(searched):.2f}x, least {min(r.ratio for r in searched):.2f}x"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) | {"ratio": r.ratio} for r in rates], indent=1))
    missed = missed_goals(rates)
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
