"""MLX's types, as mlx 0.32 computes them.

Affine: weight = code * scale + bias, with a scale and a bias for each group of columns. The end of a group's range that
is farther from zero is represented exactly, and its distance from zero is a multiple of the scale. Arithmetic is in
float32; scales and biases are stored in the model's dtype, but codes are computed from the unrounded ones.

Floats (mxfp4, mxfp8, nvfp4): weight = code * scale, where both are floats of one byte or less and the product is exact
in bfloat16. Scales are those of the largest magnitude over the largest code: rounded up to a power of two (mxfp4,
mxfp8), or to the nearest float8 (nvfp4). Each operation is rounded to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from gemma2tool.model.lazy import BFLOAT16, Array, DType, to_float32
from gemma2tool.quantizers.base import Part
from gemma2tool.quantizers.bitpack import pack_words, unpack_words
from gemma2tool.quantizers.casts import cast
from gemma2tool.quantizers.compressed import FLOAT_NAMES, round_to
from gemma2tool.quantizers.float_codes import (
    FLOAT4,
    FLOAT4_MAX,
    FLOAT8,
    FP8,
    FP8_MAX,
    POWERS_OF_TWO,
    exponent_bytes,
    nearest_fp8,
    nearest_power,
    scaled,
)
from gemma2tool.quantizers.groups import GroupScales, Rule, dequantize_groups, group_ranges, quantize_groups

GROUP_SIZE = 64
BITS = 4
"""The bits of affine codes where none are given."""
_SMALLEST_SCALE = np.float32(1e-7)


def quantize(rows: Array, bits: int, group_size: int = GROUP_SIZE) -> tuple[Array, Array, Array]:
    """Quantize (n, I) to codes uint8 (n, I), scales and biases in the dtype of ``rows`` (n, I / group_size)."""
    scales, biases = grid(*group_ranges(rows, group_size), bits)
    codes = quantize_groups(rows, GroupScales(group_size, scales, biases), Rule.FROM_BIAS, 0, 2**bits - 1)
    return codes, cast(scales, rows.dtype), cast(biases, rows.dtype)


def grid(low: Array, high: Array, bits: int) -> tuple[Array, Array]:
    """Scales and biases of groups from their smallest and largest values, float32 arrays of one shape."""
    scales = np.maximum((high - low) / np.float32(2**bits - 1), _SMALLEST_SCALE)
    from_low = np.abs(low) > np.abs(high)
    scales = np.where(from_low, scales, -scales)
    edge = np.where(from_low, low, high)
    steps = np.rint(edge / scales)
    zero = steps == 0
    scales = np.where(zero, scales, edge / np.where(zero, np.float32(1), steps))
    return scales, np.where(zero, np.float32(0), edge)


def dequantize(codes: Array, scales: Array, biases: Array) -> Array:
    """code * scale + bias, each operation rounded to the dtype of the scales: (n, I), (n, G), (n, G) to (n, I) of that
    dtype."""
    width = codes.shape[1] // scales.shape[1]
    products = to_float32(cast(dequantize_groups(codes, GroupScales(width, scales)), scales.dtype))
    sums = products.reshape(*scales.shape, width) + to_float32(biases)[..., None]
    return cast(sums.reshape(codes.shape), scales.dtype)


def unpack(words: Array, bits: int) -> Array:
    """Unpack stored words (n, I * bits / 32) to codes (n, I)."""
    return unpack_words(words, bits)


@dataclass(frozen=True)
class FloatMode:
    """One of MLX's float types: bits of a code, columns that share a scale, and the values of both by their bytes."""

    bits: int
    group_size: int
    values: Array
    scales: Array

    @property
    def has_power_scales(self) -> bool:
        """Whether scales are powers of two."""
        return self.scales is POWERS_OF_TWO

    def scale_bytes(self, absmax: Array, dtype: DType) -> Array:
        """The scales, uint8, of groups by their largest magnitudes, float32, in the arithmetic of ``dtype``."""
        scales = round_to(dtype, absmax / np.float32(FP8_MAX if self.bits == 8 else FLOAT4_MAX))
        if not self.has_power_scales:
            return np.minimum(scales, FP8_MAX).astype(FP8).view(np.uint8)
        with np.errstate(divide="ignore"):
            exponents = np.where(scales == 0, np.float32(0), np.ceil(np.log2(scales)))
        return (exponents.astype(np.int32) + 127).astype(np.uint8)

    def nearest_scales(self, scales: Array) -> Array:
        """float32 scales rounded to the positive ones that can be stored."""
        if self.has_power_scales:
            return nearest_power(scales)
        return nearest_fp8(scales)


FLOAT_MODES = MappingProxyType(
    {
        "mxfp4": FloatMode(4, 32, FLOAT4, POWERS_OF_TWO),
        "mxfp8": FloatMode(8, 32, FLOAT8, POWERS_OF_TWO),
        "nvfp4": FloatMode(4, 16, FLOAT4, FLOAT8),
    }
)


def quantize_floats(rows: Array, mode: FloatMode) -> tuple[Array, Array]:
    """Quantize (n, I), in the arithmetic of its dtype, to codes uint8 (n, I) and scales uint8 (n, I / group size)."""
    low, high = group_ranges(rows, mode.group_size)
    scales = mode.scale_bytes(np.maximum(-low, high), rows.dtype)
    used = round_to(rows.dtype, mode.scales[scales])
    values = GroupScales.of_signed_zeros(mode.group_size, used)
    rule = Rule.FLOAT8 if mode.bits == 8 else Rule.FLOAT4
    return quantize_groups(rows, values, rule, -FP8_MAX, FP8_MAX, rows.dtype), scales


def dequantize_floats(words: Array, scales: Array, mode: FloatMode) -> Array:
    """code * scale of words (n, I * bits / 32) and scales uint8 (n, I / group size): bfloat16 (n, I)."""
    return scaled(mode.values[unpack(words, mode.bits)], mode.scales[scales], BFLOAT16)


@dataclass(frozen=True)
class Affine:
    """Encoder for ``mlx-2`` to ``mlx-8``. ``dtype``: of scales and biases; rows of another dtype are cast to it
    first."""

    bits: int
    dtype: DType = BFLOAT16
    group_size: int = GROUP_SIZE

    lossless: ClassVar[bool] = False
    collects: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        return f"mlx-{self.bits}"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, columns = shape
        words, groups = columns * self.bits // 32, columns // self.group_size
        dtype, size = FLOAT_NAMES[self.dtype.name], rows * groups * self.dtype.itemsize
        return (
            Part("", "U32", (rows, words), rows * words * 4),
            Part("scales", dtype, (rows, groups), size),
            Part("biases", dtype, (rows, groups), size),
        )

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        return 1

    def encode(self, rows: Array) -> Mapping[str, Array]:
        codes, scales, biases = quantize(cast(rows, self.dtype), self.bits, self.group_size)
        return self.pack(codes, biases, scales)

    def pack(self, codes: Array, offsets: Array | None, scales: Array) -> Mapping[str, Array]:
        """The result of ``encode`` for rows that are already quantized; the offsets are biases."""
        assert offsets is not None
        return {"": pack_words(codes, self.bits), "scales": scales, "biases": offsets}

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        return {}


@dataclass(frozen=True)
class Floats:
    """Encoder for ``mlx-mxfp4``, ``mlx-mxfp8`` and ``mlx-nvfp4``. ``dtype``: of the arithmetic; rows of another dtype
    are cast to it first."""

    mode_name: str
    dtype: DType = BFLOAT16

    lossless: ClassVar[bool] = False
    collects: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        return f"mlx-{self.mode_name}"

    @property
    def mode(self) -> FloatMode:
        return FLOAT_MODES[self.mode_name]

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, columns = shape
        words, groups = columns * self.mode.bits // 32, columns // self.mode.group_size
        return Part("", "U32", (rows, words), rows * words * 4), Part("scales", "U8", (rows, groups), rows * groups)

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        return 1

    def encode(self, rows: Array) -> Mapping[str, Array]:
        codes, scales = quantize_floats(cast(rows, self.dtype), self.mode)
        return {"": pack_words(codes, self.mode.bits), "scales": scales}

    def pack(self, codes: Array, offsets: Array | None, scales: Array) -> Mapping[str, Array]:
        """The result of ``encode`` for rows that are already quantized; float32 scales that can be stored."""
        stored = exponent_bytes(scales) if self.mode.has_power_scales else scales.astype(FP8).view(np.uint8)
        return {"": pack_words(codes, self.mode.bits), "scales": stored}

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        return {}
