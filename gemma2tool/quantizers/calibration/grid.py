"""The codes a type can store, and a matrix stored in them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gemma2tool.model.lazy import FLOAT32, LazyTensor, to_float32
from gemma2tool.quantizers import awq, compressed, gptq, groups
from gemma2tool.quantizers.awq import Awq
from gemma2tool.quantizers.base import Encoder
from gemma2tool.quantizers.casts import cast
from gemma2tool.quantizers.compressed import Compressed, Scheme
from gemma2tool.quantizers.gptq import Gptq

Parameters = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Zeros (uint8) and scales of groups from their smallest and largest values, float32 (n,) each."""


@dataclass(frozen=True)
class Grid:
    """Values are (code - zero) * scale with codes 0 to ``top``; ``width`` columns share zero and scale, as ``parameters`` makes them."""

    top: int
    width: int
    parameters: Parameters


def grid_of(encoder: Encoder, columns: int) -> Grid | None:
    """The grid of an encoder whose codes can be chosen freely, for rows of so many columns; None for any other."""
    if isinstance(encoder, Gptq):
        rule = functools.partial(gptq.grid, bits=encoder.bits, symmetric=encoder.symmetric)
        return Grid(2**encoder.bits - 1, encoder.width(columns), rule)
    if isinstance(encoder, Awq):
        return Grid(2**awq.BITS - 1, encoder.width(columns), awq.grid)
    if isinstance(encoder, Compressed) and encoder.scheme.packed and encoder.scheme.bits == 4:
        scheme = encoder.scheme
        rule = functools.partial(_compressed, scheme=scheme, dtype=encoder.dtype)
        return Grid(2**scheme.bits - 1, scheme.group or columns, rule)
    return None


def _compressed(low: np.ndarray, high: np.ndarray, scheme: Scheme, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    zeros, scales = compressed.grid(low, high, scheme, dtype)
    lowest = np.uint8(1 << (scheme.bits - 1))
    return np.full(low.shape, lowest) if zeros is None else zeros.view(np.uint8) + lowest, cast(scales, dtype)


class Codes(LazyTensor):
    """A matrix (O, I) in codes: ``codes`` uint8 (O, I), ``zeros`` uint8 and ``scales`` (O, G), ``group_of_column`` (I,)."""

    dtype = FLOAT32
    stored = "codes"

    def __init__(
        self, codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group_of_column: np.ndarray, origin: str
    ) -> None:
        self.codes, self.zeros, self.scales, self.group_of_column = codes, zeros, scales, group_of_column
        self.shape, self.origin = codes.shape, origin

    def load_rows(self, first: int, last: int) -> np.ndarray:
        """What the codes of these rows stand for, float32."""
        rows = slice(first, last)
        return gptq.dequantize(self.codes[rows], self.zeros[rows], self.scales[rows], self.group_of_column)

    @property
    def record(self) -> np.dtype:
        """The type of a row as ``records`` returns it."""
        return row_record(self.shape[1], self.zeros.shape[1], self.scales.dtype)

    def records(self, first: int, last: int) -> np.ndarray:
        """Rows as they are stored: (last - first,) of ``record``."""
        rows = np.empty(last - first, self.record)
        for name in rows.dtype.names:
            rows[name] = getattr(self, name)[first:last]
        return rows


def row_record(columns: int, groups: int, scale: np.dtype) -> np.dtype:
    """One row of a matrix in codes."""
    return np.dtype([("codes", np.uint8, (columns,)), ("zeros", np.uint8, (groups,)), ("scales", scale, (groups,))])


def to_nearest(rows: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, zeros and scales of float32 rows (n, I) without looking at any input."""
    zeros, scales = grid.parameters(*groups.ranges(rows, grid.width))
    codes = groups.codes(rows, grid.width, groups.Rule.ADD_ZERO, to_float32(scales), zeros, 0, grid.top)
    return codes, zeros, scales
