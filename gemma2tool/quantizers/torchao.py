"""torchao's int8 weight-only type (``Int8WeightOnlyConfig`` version 2): symmetric, a float32 scale for each row.

The scale is computed in the dtype of the weight and stored in float32; the codes are computed with its reciprocal, in
float32. Compared with torchao 0.18.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gemma2tool.model.lazy import BFLOAT16, Array, DType, to_float32
from gemma2tool.quantizers.base import Part
from gemma2tool.quantizers.casts import cast
from gemma2tool.quantizers.float_codes import FP8
from gemma2tool.quantizers.groups import GroupScales, Rule, dequantize_groups, group_ranges, quantize_groups

_SMALLEST_SCALE = np.float32(2**-23)


def quantize(rows: Array) -> tuple[Array, Array]:
    """Quantize (n, I) to codes int8 (n, I) and scales float32 (n, 1)."""
    low, high = group_ranges(rows, rows.shape[1])
    scales = to_float32(cast(np.maximum(-low, high) / np.float32(127.5), rows.dtype))
    scales = np.maximum(scales, _SMALLEST_SCALE)
    codes = quantize_groups(rows, GroupScales(rows.shape[1], scales), Rule.RECIPROCAL, -128, 127)
    return codes.view(np.int8), scales


def dequantize(codes: Array, scales: Array, dtype: DType, zero_points: Array | None = None) -> Array:
    """(code - zero point) * scale in float32, rounded to ``dtype``: int8 or float8 (n, I), (n, G) to (n, I)."""
    width = codes.shape[1] // scales.shape[1]
    if codes.dtype == FP8:
        values = to_float32(codes).reshape(*scales.shape, width) * to_float32(scales)[..., None]
        return cast(values.reshape(codes.shape), dtype)
    return cast(dequantize_groups(codes, GroupScales(width, scales, zero_points)), dtype)


@dataclass(frozen=True)
class Int8WeightOnly:
    """Encoder for ``torchao-int8``. ``dtype``: of the scales' arithmetic; rows of another dtype are cast to it
    first."""

    dtype: DType = BFLOAT16

    name: ClassVar[str] = "torchao-int8"
    lossless: ClassVar[bool] = False
    collects: ClassVar[tuple[str, ...]] = ()

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, columns = shape
        return (
            Part("_weight_qdata", "I8", shape, rows * columns),
            Part("_weight_scale", "F32", (rows, 1), rows * 4),
            Part("_weight_zero_point", "I8", (rows, 1), rows),
        )

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        return 1

    def encode(self, rows: Array) -> Mapping[str, Array]:
        codes, scales = quantize(cast(rows, self.dtype))
        return self.pack(codes, None, scales)

    def pack(self, codes: Array, offsets: Array | None, scales: Array) -> Mapping[str, Array]:
        """The result of ``encode`` for rows that are already quantized."""
        return {
            "_weight_qdata": codes.view(np.int8),
            "_weight_scale": scales,
            "_weight_zero_point": np.zeros(scales.shape, np.int8),
        }

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        return {}
