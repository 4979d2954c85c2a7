"""How sensitive a model is to noise: the source with random errors of the candidate's size in its weights.

To the model, quantization errors are noise. On trained models the noise of a type has a known effect; on untrained or
unusual ones it may have any. Running the source with uniform noise of the same RMSE per tensor shows what this model
makes of it, and so whether a large divergence comes from the type or from a fault.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import FLOAT32, Array, LazyTensor
from gemma2tool.verify.compare.comparison import TensorComparison

_ROWS = 64
"""Rows whose noise is drawn together, so that every range of rows gets the same noise."""


class NoisyTensor(LazyTensor):
    """``source`` in float32 plus uniform noise of RMS ``rmse``; the same values for every cut into ranges of rows."""

    def __init__(self, source: LazyTensor, rmse: float, name: str) -> None:
        self.source, self.width = source, np.float32(rmse * 12**0.5)
        self.shape, self.dtype, self.stored, self.origin = source.shape, FLOAT32, "f32", f"{source.origin} with noise"
        self.key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")

    def load_rows(self, first: int, last: int) -> Array:
        rows = self.source.load_rows_f32(first, last)
        flat = rows.reshape(last - first, -1)
        for start in range(first - first % _ROWS, last, _ROWS):
            generator = np.random.Generator(np.random.Philox(key=self.key + start))
            noise = generator.random((_ROWS, flat.shape[1]), np.float32) - np.float32(0.5)
            begin, end = max(start, first), min(start + _ROWS, last)
            flat[begin - first : end - first] += self.width * noise[begin - start : end - start]
        return rows


def with_noise(source: Checkpoint, comparisons: Iterable[TensorComparison]) -> Checkpoint:
    """The source with noise in every tensor that the candidate does not store exactly, but in none that was tuned.

    It reads the source's files: do not close it.
    """
    tensors = dict(source.tensors)
    for comparison in comparisons:
        if comparison.rmse and comparison.rule != "tuned":
            name = comparison.name
            tensors[name] = NoisyTensor(tensors[name], comparison.rmse, name)
    return replace(source, tensors=tensors, closers=[])
