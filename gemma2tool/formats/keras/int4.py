"""Weights that Keras quantized in mode int4.

The kernel is reshaped to a matrix (R, C), R being the inputs that a layer sums over, and two columns share a byte, the
even one in its low half. Without groups a value is code / scale, with a scale for each column; with groups of rows it
is (code - zero) * scale, and ``g_idx`` names the group of each row. An embedding (V, D) has scales for each row
instead, and its groups divide the columns. Source: Keras 3.15 ``layers/core/{einsum_dense,embedding}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.formats.mapping.container_tensors import FileTensor
from gemma2tool.model.lazy import FLOAT32, Array, DType, LazyTensor, to_float32

_INT8 = np.dtype(np.int8)


@dataclass(frozen=True)
class Int4Variables:
    """The variables of a layer: ``codes`` int8 (R, ceil(C / 2)); ``scales`` (C,) or (G, C), of an embedding (V,) or
    (V, G); with groups also ``zeros`` int8 of the same shape and ``groups`` of the rows (columns). ``columns``: C.
    """

    codes: FileTensor
    scales: FileTensor
    zeros: FileTensor | None
    groups: FileTensor | None
    columns: int
    by_row: bool

    @classmethod
    def of(cls, layer: Mapping[int, FileTensor], hidden_size: int, *, by_row: bool) -> Int4Variables | None:
        """Those of a layer with these variables; None where they are not those of int4. ``by_row``: an embedding."""
        codes, scales = layer.get(0), layer.get(1)
        if codes is None or scales is None or codes.dtype != _INT8 or len(codes.shape) != 2 or not scales.shape:
            return None
        columns = hidden_size if by_row else scales.shape[-1]
        rows, width = codes.shape
        if width != (columns + 1) // 2 or scales.dtype.kind not in "fV":
            return None
        if set(layer) == {0, 1}:
            fits = scales.shape == ((rows,) if by_row else (columns,))
            return cls(codes, scales, None, None, columns, by_row) if fits else None
        if set(layer) != {0, 1, 2, 3} or len(scales.shape) != 2:
            return None
        grouped, others = (columns, rows) if by_row else (rows, columns)
        fits = scales.shape[0 if by_row else 1] == others and layer[2].shape == scales.shape
        fits = fits and layer[2].dtype == _INT8 and layer[3].shape == (grouped,) and layer[3].dtype.kind in "fiV"
        return cls(codes, scales, layer[2], layer[3], columns, by_row) if fits else None


class Int4Rows(LazyTensor):
    """The values of a layer in ``shape``, a matrix of as many values as its (R, C), in the same order."""

    def __init__(self, variables: Int4Variables, shape: tuple[int, int]) -> None:
        self.variables, self.shape = variables, shape
        self.dtype, self.stored, self.origin = FLOAT32, "keras-int4", variables.codes.origin
        size = variables.codes.rows * variables.columns
        if shape[0] * shape[1] != size:
            raise InputRefused(
                "keras.scales", f"{self.origin}: int4 codes of {size:,} values where the config has {shape}"
            )

    @property
    def stored_dtype(self) -> DType:
        """That of the scales, which is the one that the model computes in."""
        return self.variables.scales.dtype

    def load_rows(self, first: int, last: int) -> Array:
        width, columns = self.shape[1], self.variables.columns
        start, end = first * width // columns, -(-last * width // columns)
        values = self._matrix_rows(start, end).reshape(-1)
        offset = first * width - start * columns
        return values[offset : offset + (last - first) * width].reshape(last - first, width).copy()

    def _matrix_rows(self, start: int, end: int) -> Array:
        """Rows of (R, C) as float32."""
        layer = self.variables
        packed = layer.codes.load_rows(start, end)
        codes = np.empty((end - start, 2 * packed.shape[1]), FLOAT32)
        codes[:, 0::2] = (packed << 4) >> 4
        codes[:, 1::2] = packed >> 4
        codes = codes[:, : layer.columns]
        if layer.zeros is None or self._groups is None:
            if layer.by_row:
                return self._over(codes, to_float32(layer.scales.load_rows(start, end))[:, None])
            return self._over(codes, self._scales)
        if layer.by_row:
            scales, zeros = to_float32(layer.scales.load_rows(start, end)), layer.zeros.load_rows(start, end)
            return (codes - zeros[:, self._groups].astype(FLOAT32)) * scales[:, self._groups]
        groups = self._groups[start:end]
        return (codes - self._zeros[groups]) * self._scales[groups]

    @staticmethod
    def _over(codes: Array, scales: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return codes / scales

    @cached_property
    def _scales(self) -> Array:
        return to_float32(self.variables.scales.load())

    @cached_property
    def _zeros(self) -> Array:
        zeros = self.variables.zeros
        return np.zeros(0, FLOAT32) if zeros is None else zeros.load().astype(FLOAT32)

    @cached_property
    def _groups(self) -> Array | None:
        """The group of each row, or column of an embedding. Raises ``InputRefused`` for one that there is not."""
        layer = self.variables
        if layer.groups is None:
            return None
        values = to_float32(layer.groups.load())
        count = layer.scales.shape[1 if layer.by_row else 0]
        if not ((values >= 0) & (values < count)).all():
            raise InputRefused("keras.scales", f"{layer.groups.origin}: names groups beyond the {count} that there are")
        return values.astype(np.int64)
