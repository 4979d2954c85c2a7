"""The rotary buffer of gemma_pytorch's model class."""

from __future__ import annotations

import functools

import numpy as np

from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import Array, LazyTensor

BLOCK = 1 << 14
"""Rows that are computed at once: all of a model of 8192 positions. The buffer grows with max_position_embeddings."""

_POWER, _POWER_OF_TORCH = np.float32(2942.7273), np.float32(2942.727)
"""10000 ** (111 / 128), a power of 2B and 9B, and what torch (AVX2, AVX-512) makes of it: it rounds all others of the
released models correctly."""


class FreqsCis(LazyTensor):
    """complex64 (2 * max positions, head_dim / 2): a unit number of angle position * theta ** (-2d / head_dim).

    The numbers are those of the class, which computes them with torch; loading torch would take longer than to write
    2 GB.
    """

    def __init__(self, config: Gemma2Config, origin: str) -> None:
        self.shape = (config.max_position_embeddings * 2, config.head_dim // 2)
        self.dtype, self.stored, self.origin = np.dtype(np.complex64), "c64", origin
        self._block = functools.lru_cache(maxsize=2)(functools.partial(_rows, config))

    def load_rows(self, first: int, last: int) -> Array:
        blocks = [self._block(start) for start in range(first - first % BLOCK, last, BLOCK)]
        rows = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        skipped = first % BLOCK
        return rows[skipped : skipped + last - first].copy()


def _rows(config: Gemma2Config, first: int) -> Array:
    dim, last = config.head_dim, min(first + BLOCK, config.max_position_embeddings * 2)
    exponents = np.arange(0, dim, 2, dtype=np.float32)[: dim // 2] / np.float32(dim)
    powers = np.power(float(config.rope_theta), exponents.astype(np.float64)).astype(np.float32)
    powers[powers == _POWER] = _POWER_OF_TORCH
    angles = np.zeros((last - first, dim // 2), np.complex64)
    np.outer(np.arange(first, last, dtype=np.float32), np.float32(1) / powers, out=angles.imag)
    return np.exp(angles, out=angles)  # by the system's sine and cosine in float32, as torch.polar
