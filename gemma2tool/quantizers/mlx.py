"""MLX's types, as mlx 0.32 computes them.

Affine: weight = code * scale + bias, with a scale and a bias for each group of columns. The end of a group's range that
is farther from zero is represented exactly, and its distance from zero is a multiple of the scale. Arithmetic is in
float32; scales and biases are stored in the model's dtype, but codes are computed from the unrounded ones.

Floats (mxfp4, mxfp8, nvfp4): weight = code * scale, where both are floats of one byte or less and the product is exact
in bfloat16. They are read, not written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import ml_dtypes
import numpy as np

from gemma2tool.model.lazy import BFLOAT16, Array, DType, to_float32
from gemma2tool.quantizers.base import Part
from gemma2tool.quantizers.bitpack import pack_words, unpack_words
from gemma2tool.quantizers.casts import cast
from gemma2tool.quantizers.compressed import FLOAT_NAMES
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


_FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_FLOAT8 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_POWERS_OF_TWO = np.array([2.0**exponent for exponent in range(-127, 128)] + [np.inf], np.float32)
"""float8_e8m0: code - 127 is the exponent; MLX reads 255 as infinity."""


@dataclass(frozen=True)
class FloatMode:
    """One of MLX's float types: bits of a code, columns that share a scale, and the values of both by their bytes."""

    bits: int
    group_size: int
    values: Array
    scales: Array


FLOAT_MODES = MappingProxyType(
    {
        "mxfp4": FloatMode(4, 32, _FLOAT4, _POWERS_OF_TWO),
        "mxfp8": FloatMode(8, 32, _FLOAT8, _POWERS_OF_TWO),
        "nvfp4": FloatMode(4, 16, _FLOAT4, _FLOAT8),
    }
)


def dequantize_floats(words: Array, scales: Array, mode: FloatMode) -> Array:
    """code * scale of words (n, I * bits / 32) and scales uint8 (n, I / group size): bfloat16 (n, I)."""
    values = mode.values[unpack(words, mode.bits)].reshape(*scales.shape, mode.group_size)
    with np.errstate(over="ignore", invalid="ignore"):
        return cast((values * mode.scales[scales][..., None]).reshape(len(words), -1), BFLOAT16)


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
