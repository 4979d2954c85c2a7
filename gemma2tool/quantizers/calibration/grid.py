"""The grid of values that a type can store, and a matrix quantized to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gemma2tool.model.lazy import FLOAT32, Array, DType, LazyTensor
from gemma2tool.quantizers import awq, compressed, gptq
from gemma2tool.quantizers.awq import Awq
from gemma2tool.quantizers.base import Encoder
from gemma2tool.quantizers.casts import cast
from gemma2tool.quantizers.compressed import Compressed, Scheme
from gemma2tool.quantizers.gptq import Gptq
from gemma2tool.quantizers.groups import GroupScales, Rule, group_ranges, quantize_groups

Parameters = Callable[[Array, Array], tuple[Array, Array]]
"""Zeros (uint8) and scales of groups from their smallest and largest values, float32 (n,) each."""


@dataclass(frozen=True)
class Grid:
    """The values (code - zero) * scale for codes 0 to ``top``. ``group_size`` columns share zero and scale, which
    ``parameters`` derives from their range."""

    top: int
    group_size: int
    parameters: Parameters


def grid_of(encoder: Encoder, columns: int) -> Grid | None:
    """The grid of an encoder whose codes can be chosen freely, for rows of this many columns; None for any other
    encoder."""
    if isinstance(encoder, Gptq):
        parameters = functools.partial(gptq.grid, bits=encoder.bits, symmetric=encoder.symmetric)
        return Grid(2**encoder.bits - 1, encoder.columns_per_group(columns), parameters)
    if isinstance(encoder, Awq):
        return Grid(2**awq.BITS - 1, encoder.columns_per_group(columns), awq.grid)
    if isinstance(encoder, Compressed) and encoder.scheme.packed and encoder.scheme.bits == 4:
        scheme = encoder.scheme
        parameters = functools.partial(_compressed_parameters, scheme=scheme, dtype=encoder.dtype)
        return Grid(2**scheme.bits - 1, scheme.group_size or columns, parameters)
    return None


def _compressed_parameters(low: Array, high: Array, scheme: Scheme, dtype: DType) -> tuple[Array, Array]:
    zeros, scales = compressed.grid(low, high, scheme, dtype)
    lowest = np.uint8(1 << (scheme.bits - 1))
    return np.full(low.shape, lowest) if zeros is None else zeros.view(np.uint8) + lowest, cast(scales, dtype)


class QuantizedMatrix(LazyTensor):
    """A quantized matrix: ``codes`` uint8 (O, I), ``zeros`` uint8 and ``scales`` (O, G), ``group_of_column`` (I,)."""

    dtype = FLOAT32
    stored = "codes"

    def __init__(self, codes: Array, zeros: Array, scales: Array, group_of_column: Array, origin: str) -> None:
        self.codes, self.zeros, self.scales, self.group_of_column = codes, zeros, scales, group_of_column
        self.shape, self.origin = codes.shape, origin

    def load_rows(self, first: int, last: int) -> Array:
        """The values of these rows, float32 (n, I)."""
        rows = slice(first, last)
        return gptq.dequantize(self.codes[rows], self.zeros[rows], self.scales[rows], self.group_of_column)

    @property
    def record_dtype(self) -> DType:
        """The dtype of a row as ``load_records`` returns it."""
        return record_dtype(self.shape[1], self.zeros.shape[1], self.scales.dtype)

    def load_records(self, first: int, last: int) -> Array:
        """These rows as records of codes, zeros and scales: (last - first,) of ``record_dtype``."""
        rows = np.empty(last - first, self.record_dtype)
        for name in ("codes", "zeros", "scales"):
            rows[name] = getattr(self, name)[first:last]
        return rows


def record_dtype(columns: int, groups: int, scale_dtype: DType) -> DType:
    """The dtype of a row of a quantized matrix: codes, zeros and scales."""
    return np.dtype(
        [("codes", np.uint8, (columns,)), ("zeros", np.uint8, (groups,)), ("scales", scale_dtype, (groups,))]
    )


def quantize_to_nearest(rows: Array, grid: Grid) -> tuple[Array, Array, Array]:
    """Quantize float32 rows (n, I) to the nearest codes: codes uint8 (n, I), zeros and scales (n, G)."""
    zeros, scales = grid.parameters(*group_ranges(rows, grid.group_size))
    codes = quantize_groups(rows, GroupScales(grid.group_size, scales, zeros), Rule.ADD_ZERO, 0, grid.top)
    return codes, zeros, scales
