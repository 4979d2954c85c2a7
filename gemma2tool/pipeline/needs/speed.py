"""How fast this machine is: what estimates are scaled by. Costs a few milliseconds, and no torch."""

from __future__ import annotations

import functools
import time

import numpy as np

from gemma2tool.formats.base import OutputTensor

_SIZE, _MATRICES, _TRIES = 64, 32, 5
_VALUES = 1 << 16
SLOWEST = 2.0
"""Seconds after which a sample is not timed again."""


@functools.cache
def speed() -> float:
    """Floating-point operations per second of one thread that multiplies matrices of 64, which the libraries do on one
    thread; the median of a few tries.
    """
    a = np.ones((_MATRICES, _SIZE, _SIZE), np.float32)
    times = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        np.matmul(a, a)
        times.append(time.perf_counter() - start)
    return 2.0 * _MATRICES * _SIZE**3 / sorted(times)[_TRIES // 2]


def encoding_seconds(item: OutputTensor) -> float:
    """Seconds for a value of this tensor to be encoded on one thread, from a sample of noise."""
    shape = item.source.shape
    columns = item.source.row_size
    rows = max(_VALUES // columns, 1)
    multiple = item.encoder.row_multiple(shape)
    rows = min(-(-rows // multiple) * multiple, item.source.rows)
    noise = np.random.default_rng(0).standard_normal((rows, *shape[1:]), np.float32) * np.float32(0.02)
    sample = noise.astype(item.source.dtype)
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        item.encoder.encode(sample)
        best = min(best, time.perf_counter() - start)
        if best > SLOWEST:
            break
    return best / sample.size
