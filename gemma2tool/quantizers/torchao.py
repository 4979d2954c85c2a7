"""torchao's types: round-to-nearest with the arithmetic of torchao 0.18, symmetric except for int4.

int8 and float8 have a scale for each row, computed in the dtype of the weight and stored in float32. The unpacked int4
of 8-bit activations (``Int8DynamicActivationIntxWeightConfig``) has one for each group, in the dtype of the weight, in
which its codes are computed too. int4 (``Int4WeightOnlyConfig``, plain) has a scale and a zero point, which is a value
rather than a code: weight = code * scale + zero point, with codes from -8 to 7. torchao takes that from mslk, which
computes in float32 and stores both, transposed, in the dtype of the weight.

A row of zeros is stored as zeros; torchao's float8 stores NaN for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gemma2tool.model.lazy import BFLOAT16, FLOAT16, Array, DType, to_float32
from gemma2tool.quantizers.base import Part
from gemma2tool.quantizers.bitpack import pack_nibbles, transposed, unpack_nibbles
from gemma2tool.quantizers.casts import cast
from gemma2tool.quantizers.compressed import FLOAT_NAMES, round_to
from gemma2tool.quantizers.float_codes import FP8, FP8_MAX
from gemma2tool.quantizers.groups import GroupScales, Rule, dequantize_groups, group_ranges, quantize_groups

_SMALLEST_SCALE = np.float32(2**-23)
_SMALLEST_NORMAL = {FLOAT16: np.float32(2.0**-14)}
_SMALLEST_RANGE = np.float32(1e-6)
"""Of an int4 group."""


def quantize(rows: Array) -> tuple[Array, Array]:
    """Quantize (n, I) to codes int8 (n, I) and scales float32 (n, 1)."""
    low, high = group_ranges(rows, rows.shape[1])
    scales = to_float32(cast(np.maximum(-low, high) / np.float32(127.5), rows.dtype))
    scales = np.maximum(scales, _SMALLEST_SCALE)
    codes = quantize_groups(rows, GroupScales(rows.shape[1], scales), Rule.RECIPROCAL, -128, 127)
    return codes.view(np.int8), scales


def quantize_float8(rows: Array) -> tuple[Array, Array]:
    """Quantize (n, I) to codes float8_e4m3fn (n, I) and scales float32 (n, 1)."""
    low, high = group_ranges(rows, rows.shape[1])
    scales = round_to(rows.dtype, np.maximum(-low, high) / np.float32(FP8_MAX))
    scales = np.where(scales == 0, np.float32(1), scales)
    groups = GroupScales.of_signed_zeros(rows.shape[1], scales)
    return quantize_groups(rows, groups, Rule.FLOAT8, -FP8_MAX, FP8_MAX).view(FP8), scales


def quantize_unpacked_int4(rows: Array, group_size: int) -> tuple[Array, Array]:
    """Quantize (n, I) to codes int8 (n, I) and scales (n, I / group_size), in the dtype and the arithmetic of
    ``rows``.
    """
    low, high = group_ranges(rows, group_size)
    scales = round_to(rows.dtype, np.maximum(-low, high) / np.float32(7.5))
    scales = np.maximum(scales, _SMALLEST_NORMAL.get(rows.dtype, np.float32(2.0**-126)))
    inverse = round_to(rows.dtype, 1 / scales)
    products = to_float32(rows).reshape(*scales.shape, group_size) * inverse[..., None]
    codes = np.clip(np.rint(round_to(rows.dtype, products)), -8, 7).astype(np.int8)
    return codes.reshape(rows.shape), cast(scales, rows.dtype)


def quantize_int4(rows: Array, group_size: int) -> tuple[Array, Array, Array]:
    """Quantize (n, I) to codes int8 (n, I), scales and zero points in the dtype of ``rows`` (n, I / group_size)."""
    low, high = group_ranges(rows, group_size)
    scales, zero_points = int4_grid(low, high)
    codes = quantize_groups(rows, GroupScales(group_size, scales, low), Rule.FROM_BIAS, 0, 15)
    return codes.view(np.int8) - np.int8(8), cast(scales, rows.dtype), cast(zero_points, rows.dtype)


def int4_grid(low: Array, high: Array) -> tuple[Array, Array]:
    """Scales and zero points of groups from their smallest and largest values, float32 arrays of one shape."""
    scales = np.maximum(high - low, _SMALLEST_RANGE) / np.float32(15)
    return scales, low + scales * np.float32(8)


def dequantize(codes: Array, scales: Array, dtype: DType, zero_points: Array | None = None) -> Array:
    """(code - zero point) * scale in float32, rounded to ``dtype``: int8 or float8 (n, I), (n, G) to (n, I)."""
    width = codes.shape[1] // scales.shape[1]
    if codes.dtype not in (np.int8, np.uint8):
        values = to_float32(codes).reshape(*scales.shape, width) * to_float32(scales)[..., None]
        return cast(values.reshape(codes.shape), dtype)
    return cast(dequantize_groups(codes, GroupScales(width, scales, zero_points)), dtype)


def dequantize_int4(codes: Array, scales: Array, zero_points: Array) -> Array:
    """code * scale + zero point, each operation rounded to the dtype of the scales: int8 (n, I), (n, G), (n, G) to (n,
    I).
    """
    width = codes.shape[1] // scales.shape[1]
    products = round_to(scales.dtype, dequantize_groups(codes, GroupScales(width, scales)))
    values = products.reshape(*scales.shape, width) + to_float32(zero_points)[..., None]
    return cast(values.reshape(codes.shape), scales.dtype)


def unpack_int4(packed: Array) -> Array:
    """Codes int8 (n, I) from -8 to 7 of bytes (n, I / 2), the first code in the low half."""
    codes = unpack_nibbles(packed.view(np.uint8)).view(np.int8)
    return (codes ^ np.int8(8)) - np.int8(8)


@dataclass(frozen=True)
class RowScales:
    """What the encoders of ``torchao-int8`` and ``torchao-fp8`` share. ``dtype``: of the scales' arithmetic; rows of
    another dtype are cast to it first."""

    name: str
    dtype: DType = BFLOAT16

    lossless: ClassVar[bool] = False
    collects: ClassVar[tuple[str, ...]] = ()

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        return 1

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        return {}


@dataclass(frozen=True)
class Int8WeightOnly(RowScales):
    """Encoder for ``torchao-int8``, and for ``torchao-int8-dynamic``, whose weights are the same."""

    name: str = "torchao-int8"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, columns = shape
        return (
            Part("_weight_qdata", "I8", shape, rows * columns),
            Part("_weight_scale", "F32", (rows, 1), rows * 4),
            Part("_weight_zero_point", "I8", (rows, 1), rows),
        )

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


@dataclass(frozen=True)
class Float8(RowScales):
    """Encoder for ``torchao-fp8``, and for ``torchao-fp8-dynamic``, whose weights are the same."""

    name: str = "torchao-fp8"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, columns = shape
        return (
            Part("_weight_qdata", "F8_E4M3", shape, rows * columns),
            Part("_weight_scale", "F32", (rows, 1), rows * 4),
        )

    def encode(self, rows: Array) -> Mapping[str, Array]:
        codes, scales = quantize_float8(cast(rows, self.dtype))
        return self.pack(codes, None, scales)

    def pack(self, codes: Array, offsets: Array | None, scales: Array) -> Mapping[str, Array]:
        """The result of ``encode`` for rows that are already quantized."""
        return {"_weight_qdata": codes.view(FP8), "_weight_scale": scales}


@dataclass(frozen=True)
class UnpackedInt4:
    """Encoder for ``torchao-int8-int4``: int4 codes, one in a byte, for activations in int8. ``dtype``: of scales and
    arithmetic; rows of another dtype are cast to it first."""

    dtype: DType = BFLOAT16
    group_size: int = 32

    name: ClassVar[str] = "torchao-int8-int4"
    lossless: ClassVar[bool] = False
    collects: ClassVar[tuple[str, ...]] = ()

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, columns = shape
        groups = columns // self.group_size
        return (
            Part("_weight_qdata", "I8", shape, rows * columns),
            Part("_weight_scale", FLOAT_NAMES[self.dtype.name], (rows, groups), rows * groups * self.dtype.itemsize),
            Part("_weight_zero_point", "I8", (rows, groups), rows * groups),
        )

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        return 1

    def encode(self, rows: Array) -> Mapping[str, Array]:
        codes, scales = quantize_unpacked_int4(cast(rows, self.dtype), self.group_size)
        return self.pack(codes, None, scales)

    def pack(self, codes: Array, offsets: Array | None, scales: Array) -> Mapping[str, Array]:
        """The result of ``encode`` for rows that are already quantized."""
        return {
            "_weight_qdata": codes.view(np.int8),
            "_weight_scale": cast(scales, self.dtype),
            "_weight_zero_point": np.zeros(scales.shape, np.int8),
        }

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        return {}


@dataclass(frozen=True)
class Int4:
    """Encoder for ``torchao-int4``. ``dtype``: of scales and zero points; rows of another dtype are cast to it
    first."""

    dtype: DType = BFLOAT16
    group_size: int = 128

    name: ClassVar[str] = "torchao-int4"
    lossless: ClassVar[bool] = False
    collects: ClassVar[tuple[str, ...]] = ("_weight_scale", "_weight_zero_point")

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, columns = shape
        groups = columns // self.group_size
        dtype, size = FLOAT_NAMES[self.dtype.name], rows * groups * self.dtype.itemsize
        return (
            Part("_weight_qdata", "I8", (rows, columns // 2), rows * columns // 2),
            Part("_weight_scale", dtype, (groups, rows), size, streamed=False),
            Part("_weight_zero_point", dtype, (groups, rows), size, streamed=False),
        )

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        return 1

    def encode(self, rows: Array) -> Mapping[str, Array]:
        codes, scales, zero_points = quantize_int4(cast(rows, self.dtype), self.group_size)
        return self.pack(codes, zero_points, scales)

    def pack(self, codes: Array, offsets: Array | None, scales: Array) -> Mapping[str, Array]:
        """The result of ``encode`` for rows that are already quantized; the offsets are zero points."""
        assert offsets is not None
        return {
            "_weight_qdata": pack_nibbles(codes.view(np.uint8) & np.uint8(15)).view(np.int8),
            "_weight_scale": cast(scales, self.dtype),
            "_weight_zero_point": cast(offsets, self.dtype),
        }

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        return {name: transposed(collected[name]) for name in self.collects}
