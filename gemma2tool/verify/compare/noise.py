"""How much a model minds noise: the source with random errors of the candidate's size in its own weights.

A quantized candidate's errors are, to the model, noise. On trained models a type's noise costs a known amount; on
untrained or unusual ones it may cost any. Running the source with uniform noise of the same RMSE per tensor tells what
this model makes of it, and so whether a large divergence is the type's doing or a fault.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import FLOAT32, LazyTensor
from gemma2tool.verify.compare.comparison import TensorComparison

_ROWS = 64  # rows whose noise is drawn together, so that any range of rows sees the same


class NoisyTensor(LazyTensor):
    """``source`` in float32 plus uniform noise of RMS ``rmse``; the same values however its rows are cut."""

    def __init__(self, source: LazyTensor, rmse: float, name: str) -> None:
        self.source, self.width = source, np.float32(rmse * 12**0.5)
        self.shape, self.dtype, self.stored, self.origin = source.shape, FLOAT32, "f32", f"{source.origin} with noise"
        self.key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")

    def load_rows(self, first: int, last: int) -> np.ndarray:
        rows = self.source.load_rows_f32(first, last)
        flat = rows.reshape(last - first, -1)
        for start in range(first - first % _ROWS, last, _ROWS):
            draw = np.random.Generator(np.random.Philox(key=self.key + start))
            noise = draw.random((_ROWS, flat.shape[1]), np.float32) - np.float32(0.5)
            a, b = max(start, first), min(start + _ROWS, last)
            flat[a - first : b - first] += self.width * noise[a - start : b - start]
        return rows


def with_noise(source: Checkpoint, comparisons: Iterable[TensorComparison]) -> Checkpoint:
    """The source with noise in every tensor that the candidate does not hold exactly. Borrows the source's files: do
    not close it."""
    tensors = dict(source.tensors)
    for each in comparisons:
        if each.rmse:
            tensors[each.name] = NoisyTensor(tensors[each.name], each.rmse, each.name)
    return Checkpoint(source.path, source.facts, source.config, tensors)
