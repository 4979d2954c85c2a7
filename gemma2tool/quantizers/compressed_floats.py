"""compressed-tensors' microscaling types, nvfp4a16, mxfp4a16 and mxfp8a16, with codes that are floats of 4 or 8 bits.

Groups of 32 columns (mxfp4, mxfp8) share a power of two, that of the largest magnitude, rounded up from 1.75 on, over
the largest power of two among the codes. Groups of 16 (nvfp4) share a float8 scale, times the inverse of a float32
scale of the tensor, which spreads them over float8's range: 448 * 6 / absmax. Engines run q, k and v, and gate and up,
as one matrix, so those have one tensor scale.

As in the library, ranges and the tensor scale are rounded to the dtype of the weight; codes are computed in float32.
Compared with compressed-tensors 0.20 and llm-compressor 0.14.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from gemma2tool.model.lazy import BFLOAT16, FLOAT16, Array, DType, LazyTensor
from gemma2tool.quantizers.base import Part
from gemma2tool.quantizers.bitpack import pack_nibbles
from gemma2tool.quantizers.casts import cast
from gemma2tool.quantizers.compressed import round_to
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
from gemma2tool.quantizers.groups import GroupScales, Rule, group_ranges, quantize_groups

_SURVEY_VALUES = 1 << 22
_SMALLEST_NORMAL = {FLOAT16: 2.0**-14}
_ZERO_SCALE = 0.125
"""The library's scale of a group of zeros."""


@dataclass(frozen=True)
class FloatScheme:
    """``bits`` of a code, and how many columns share a scale; those of 16 columns are float8, under a tensor scale."""

    bits: int
    group_size: int

    @property
    def has_tensor_scale(self) -> bool:
        return self.group_size == 16

    @property
    def values(self) -> Array:
        """The value of each code, float32."""
        return FLOAT4 if self.bits == 4 else FLOAT8


FLOAT_SCHEMES: Mapping[str, FloatScheme] = {
    "nvfp4a16": FloatScheme(4, 16),
    "mxfp4a16": FloatScheme(4, 32),
    "mxfp8a16": FloatScheme(8, 32),
}


def tensor_scale(absmax: float, dtype: DType) -> float:
    """The scale of a tensor, or of several that engines run as one, from its largest magnitude.

    A number over a tensor is the product of the number and the tensor's reciprocal in torch, each rounded to ``dtype``.
    """
    largest = np.array([max(absmax, _SMALLEST_NORMAL.get(dtype, 2.0**-126))], np.float32)
    with np.errstate(over="ignore"):
        scale = float(round_to(dtype, np.float32(FP8_MAX * FLOAT4_MAX) * round_to(dtype, 1 / largest))[0])
    return scale if np.isfinite(scale) else 1.0


def group_scales(absmax: Array, scheme: FloatScheme, dtype: DType, global_scale: float) -> Array:
    """The scales that groups with these largest magnitudes, float32, are quantized by; float32."""
    if scheme.has_tensor_scale:
        own = round_to(dtype, absmax / np.float32(FLOAT4_MAX)) * np.float32(global_scale)
        stored = np.minimum(own, np.float32(FP8_MAX)).astype(FP8).astype(np.float32)
        return np.where(stored == 0, np.float32(_ZERO_SCALE), stored) / np.float32(global_scale)
    bits = np.ascontiguousarray(absmax).view(np.uint32) + np.uint32(1 << 21)
    exponents = (bits >> 23).astype(np.int32) - (2 if scheme.bits == 4 else 8)
    return POWERS_OF_TWO[np.clip(exponents, 0, 254)]


def quantize(rows: Array, scheme: FloatScheme, global_scale: float) -> tuple[Array, Array]:
    """Quantize (n, I), I a multiple of the group size, to codes uint8 (n, I) and scales float32 (n, G)."""
    low, high = group_ranges(rows, scheme.group_size)
    scales = group_scales(np.maximum(-low, high), scheme, rows.dtype, global_scale)
    rule = Rule.FLOAT4_EVEN if scheme.bits == 4 else Rule.FLOAT8
    groups = GroupScales.of_signed_zeros(scheme.group_size, scales)
    return quantize_groups(rows, groups, rule, -FP8_MAX, FP8_MAX), scales


def dequantize(codes: Array, scales: Array, scheme: FloatScheme, dtype: DType = BFLOAT16) -> Array:
    """code * scale of codes uint8 (n, I) and float32 scales (n, G), rounded to ``dtype``."""
    return scaled(scheme.values[codes], scales, dtype)


def stored_scales(raw: Array, scheme: FloatScheme, global_scale: float) -> Array:
    """The float32 scales of bytes as they are stored."""
    if scheme.has_tensor_scale:
        scales: Array = FLOAT8[raw.view(np.uint8)] / np.float32(global_scale)
        return scales
    powers: Array = POWERS_OF_TWO[raw]
    return powers


@dataclass(frozen=True)
class CompressedFloats:
    """Encoder for one of FLOAT_SCHEMES. ``dtype``: rows of another dtype are cast to it first. ``absmax``: of nvfp4,
    the largest magnitude of the tensor, or of those that share its tensor scale; see ``surveyed``."""

    name: str
    dtype: DType = BFLOAT16
    absmax: float = 0.0

    lossless: ClassVar[bool] = False
    collects: ClassVar[tuple[str, ...]] = ()

    @property
    def scheme(self) -> FloatScheme:
        return FLOAT_SCHEMES[self.name]

    @property
    def global_scale(self) -> float:
        return tensor_scale(self.absmax, self.dtype) if self.scheme.has_tensor_scale else 1.0

    def surveyed(self, source: LazyTensor) -> CompressedFloats:
        """With the largest magnitude of ``source``, which is read once if the type needs it."""
        if not self.scheme.has_tensor_scale:
            return self
        step, absmax = max(1, _SURVEY_VALUES // source.row_size), 0.0
        for first in range(0, source.rows, step):
            rows = cast(source.load_rows(first, min(first + step, source.rows)), self.dtype)
            low, high = group_ranges(rows, rows.shape[1])
            absmax = max(absmax, float(-low.min()), float(high.max()))
        return replace(self, absmax=absmax)

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        return 1

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        (rows, columns), scheme = shape, self.scheme
        groups = columns // scheme.group_size
        scale = Part("weight_scale", "F8_E4M3" if scheme.has_tensor_scale else "U8", (rows, groups), rows * groups)
        if scheme.bits == 8:
            return Part("", "F8_E4M3", shape, rows * columns), scale
        packed = Part("weight_packed", "U8", (rows, columns // 2), rows * columns // 2)
        if not scheme.has_tensor_scale:
            return packed, scale
        return packed, scale, Part("weight_global_scale", "F32", (1,), 4, streamed=False)

    def encode(self, rows: Array) -> Mapping[str, Array]:
        codes, scales = quantize(cast(rows, self.dtype), self.scheme, self.global_scale)
        return self.pack(codes, None, scales)

    def pack(self, codes: Array, offsets: Array | None, scales: Array) -> Mapping[str, Array]:
        """The result of ``encode`` for rows that are already quantized; float32 scales that can be stored."""
        if self.scheme.has_tensor_scale:
            stored = np.minimum(scales * np.float32(self.global_scale), np.float32(FP8_MAX)).astype(FP8)
        else:
            stored = exponent_bytes(scales)
        main = {"": codes.view(FP8)} if self.scheme.bits == 8 else {"weight_packed": pack_nibbles(codes)}
        return main | {"weight_scale": stored}

    def nearest_scales(self, scales: Array) -> Array:
        """float32 scales rounded to the positive ones that can be stored."""
        if not self.scheme.has_tensor_scale:
            return nearest_power(scales)
        of_tensor = np.float32(self.global_scale)
        return nearest_fp8(scales * of_tensor) / of_tensor

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        if not self.scheme.has_tensor_scale:
            return {}
        return {"weight_global_scale": np.array([self.global_scale], np.float32)}
