"""The round-to-nearest schemes of compressed-tensors, as vLLM serves them.

As in the library, each operation is rounded to the dtype of the weight (bfloat16 for Gemma): scale = absmax / half the
range, code = round(clamp(weight / scale)). It divides instead of multiplying by the reciprocal, and clamps before it
rounds. Compared with compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gemma2tool.model.lazy import BFLOAT16, FLOAT16, FLOAT32, Array, DType, to_float32
from gemma2tool.quantizers.base import Part
from gemma2tool.quantizers.bitpack import WORD_BITS, pack_words, unpack_words
from gemma2tool.quantizers.casts import cast
from gemma2tool.quantizers.float_codes import FLOAT8, FP8, FP8_MAX
from gemma2tool.quantizers.groups import GroupScales, Rule, dequantize_groups, group_ranges, quantize_groups

_EPS = {FLOAT32: np.float32(2**-23), FLOAT16: np.float32(2**-10), BFLOAT16: np.float32(2**-7)}
FLOAT_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Scheme:
    """A weight scheme: ``bits`` and ``kind`` ("int" or "float") of the codes, and whether they are packed.

    ``group_size``: how many columns share a scale, None for a whole row. ``block_rows``: how many rows share it.
    """

    bits: int
    kind: str
    group_size: int | None
    block_rows: int = 1
    symmetric: bool = True
    packed: bool = False

    @property
    def low(self) -> float:
        return -FP8_MAX if self.kind == "float" else -(2.0 ** (self.bits - 1))

    @property
    def high(self) -> float:
        return FP8_MAX if self.kind == "float" else 2.0 ** (self.bits - 1) - 1

    def group_count(self, columns: int) -> int:
        """How many scales a row of this many columns has. Raises ValueError where the library cannot store such a
        row."""
        if self.group_size is None:
            return 1
        if columns % self.group_size and self.block_rows == 1:
            raise ValueError(f"{columns} columns are not a multiple of the group size {self.group_size}")
        return -(-columns // self.group_size)


SCHEMES = {
    "w8a8-int8": Scheme(8, "int", None),
    "w8a16": Scheme(8, "int", 128, packed=True),
    "w4a16": Scheme(4, "int", 128, packed=True),
    "w4afp8": Scheme(4, "int", 128, packed=True),
    "w4a16-asym": Scheme(4, "int", 128, symmetric=False, packed=True),
    "fp8-dynamic": Scheme(8, "float", None),
    "fp8-block": Scheme(8, "float", 128, block_rows=128),
}


def round_to(dtype: DType, values: Array) -> Array:
    """float32 values rounded to ``dtype``, as float32."""
    return values if dtype == np.float32 else to_float32(cast(values, dtype))


def quantize(rows: Array, scheme: Scheme) -> tuple[Array, Array, Array | None]:
    """Quantize (n, I) of any float dtype, in the arithmetic of that dtype.

    Returns codes (n, I), int8 or float8_e4m3fn; scales (ceil(n / block_rows), G) in the dtype of ``rows``; and zero
    points, int8 of the shape of the scales, or None where the scheme is symmetric.
    """
    dtype, (n, columns) = rows.dtype, rows.shape
    width, height = scheme.group_size or columns, scheme.block_rows
    scheme.group_count(columns)
    low, high = group_ranges(rows, width)
    if height > 1:
        starts = np.arange(0, n, height)
        low, high = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
    zero_points, scales = grid(low, high, scheme, dtype)
    rule = Rule.FLOAT8 if scheme.kind == "float" else Rule.DIVIDE
    groups = _groups_of_rows(scheme, columns, scales, zero_points, n)
    codes = quantize_groups(rows, groups, rule, scheme.low, scheme.high, dtype)
    return codes.view(FP8 if scheme.kind == "float" else np.int8), cast(scales, dtype), zero_points


def grid(low: Array, high: Array, scheme: Scheme, dtype: DType) -> tuple[Array | None, Array]:
    """Zero points int8 (None where the scheme is symmetric) and scales, float32 values rounded to ``dtype``, of groups
    from their smallest and largest values."""
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    levels = np.float32(scheme.high - scheme.low)
    zero_points = None
    with np.errstate(invalid="ignore", divide="ignore"):
        if scheme.symmetric:
            scales = round_to(dtype, np.maximum(-low, high) / (levels / 2))
        else:
            scales = round_to(dtype, round_to(dtype, high - low) / levels)
            zeros = np.clip(
                round_to(dtype, np.float32(scheme.low) - round_to(dtype, low / scales)), scheme.low, scheme.high
            )
            zero_points = np.where(np.isnan(zeros), 0, np.rint(zeros)).astype(np.int8)
    scales[scales == 0] = _EPS[dtype]
    return zero_points, scales


def unsigned_grid(low: Array, high: Array, scheme: Scheme, dtype: DType) -> tuple[Array, Array]:
    """The same with zero points uint8, counted from the lowest code, and scales in ``dtype``."""
    zeros, scales = grid(low, high, scheme, dtype)
    lowest = np.uint8(1 << (scheme.bits - 1))
    return np.full(low.shape, lowest) if zeros is None else zeros.view(np.uint8) + lowest, cast(scales, dtype)


def dequantize(codes: Array, scales: Array, zero_points: Array | None, scheme: Scheme) -> Array:
    """(code - zero point) * scale in the dtype of the scales. A range of rows must start at a multiple of
    ``block_rows``."""
    n, columns = codes.shape
    groups = _groups_of_rows(scheme, columns, scales, zero_points, n)
    if codes.dtype == FP8:
        wide = np.repeat(to_float32(groups.scales), groups.group_size, axis=1)[:, :columns]
        return cast(FLOAT8[codes.view(np.uint8)] * wide, scales.dtype)
    return cast(dequantize_groups(codes, groups), scales.dtype)


def _groups_of_rows(scheme: Scheme, columns: int, scales: Array, zero_points: Array | None, rows: int) -> GroupScales:
    """The scales and zero points of blocks of rows, (ceil(rows / block_rows), G), repeated for each row: (rows, G)."""

    def of_rows(by_block: Array) -> Array:
        return by_block if scheme.block_rows == 1 else np.repeat(by_block, scheme.block_rows, axis=0)[:rows]

    offsets = None if zero_points is None else of_rows(zero_points)
    return GroupScales(scheme.group_size or columns, of_rows(scales), offsets)


def word_count(columns: int, bits: int) -> int:
    """The words that a row of codes takes; the last may have bits that stay 0."""
    return -(-columns * bits // WORD_BITS)


def pack(codes: Array, bits: int) -> Array:
    """Pack int8 codes (n, m), offset to be unsigned, into int32 words along the last axis."""
    unsigned = (codes.view(np.uint8) + np.uint8(1 << (bits - 1))) & np.uint8((1 << bits) - 1)
    missing = word_count(codes.shape[-1], bits) * WORD_BITS // bits - codes.shape[-1]
    return pack_words(np.pad(unsigned, ((0, 0), (0, missing))) if missing else unsigned, bits).view(np.int32)


def unpack(words: Array, bits: int, columns: int | None = None) -> Array:
    """The inverse of ``pack``: int8 codes, the first ``columns`` of each row."""
    return (unpack_words(words, bits)[..., :columns] - np.uint8(1 << (bits - 1))).view(np.int8)


@dataclass(frozen=True)
class Compressed:
    """Encoder for one of SCHEMES. ``dtype``: the dtype of the arithmetic; rows of another dtype are cast to it first.

    ``variant``: the scheme with another group size, None for the scheme itself.
    """

    name: str
    dtype: DType = BFLOAT16
    variant: Scheme | None = None

    lossless: ClassVar[bool] = False

    @property
    def scheme(self) -> Scheme:
        return self.variant or SCHEMES[self.name]

    @property
    def collects(self) -> tuple[str, ...]:
        return () if self.scheme.symmetric else ("weight_zero_point",)

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        return self.scheme.block_rows

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        scheme, (rows, columns) = self.scheme, shape
        scales = (-(-rows // scheme.block_rows), scheme.group_count(columns))
        scale = Part("weight_scale", FLOAT_NAMES[self.dtype.name], scales, scales[0] * scales[1] * self.dtype.itemsize)
        if not scheme.packed:
            return Part("", "F8_E4M3" if scheme.kind == "float" else "I8", shape, rows * columns), scale
        words = word_count(columns, scheme.bits)
        parts = [Part("weight_packed", "I32", (rows, words), rows * words * 4), scale]
        if not scheme.symmetric:
            zero_rows = -(-rows * scheme.bits // 32)
            size = zero_rows * scales[1] * 4
            parts.append(Part("weight_zero_point", "I32", (zero_rows, scales[1]), size, streamed=False))
        return (*parts, Part("weight_shape", "I64", (2,), 16, streamed=False))

    def encode(self, rows: Array) -> Mapping[str, Array]:
        scheme = self.scheme
        codes, scales, zero_points = quantize(cast(rows, self.dtype), scheme)
        main = {"weight_packed": pack(codes, scheme.bits)} if scheme.packed else {"": codes}
        main["weight_scale"] = scales
        if zero_points is not None:
            main["weight_zero_point"] = zero_points
        return main

    def pack(self, codes: Array, offsets: Array | None, scales: Array) -> Mapping[str, Array]:
        """The result of ``encode`` for rows that are already quantized. Codes and zero points are uint8, counted from
        the lowest code; codes of floats are their bytes. Rows of a tile have the same scales.
        """
        scheme = self.scheme
        scales = scales[:: scheme.block_rows]
        if scheme.kind == "float":
            return {"": codes.view(FP8), "weight_scale": scales}
        lowest = np.uint8(1 << (scheme.bits - 1))
        signed = (codes - lowest).view(np.int8)
        main = {"weight_packed": pack(signed, scheme.bits)} if scheme.packed else {"": signed}
        main["weight_scale"] = scales
        return (
            main
            if scheme.symmetric or offsets is None
            else main | {"weight_zero_point": (offsets - lowest).view(np.int8)}
        )

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        scheme = self.scheme
        if not scheme.packed:
            return {}
        parts = {"weight_shape": np.array(shape, np.int64)}
        if not scheme.symmetric:
            zero_points = collected["weight_zero_point"].T  # packed along the rows of the weight
            missing = -zero_points.shape[1] % (32 // scheme.bits)
            filled = np.pad(zero_points, ((0, 0), (0, missing)), constant_values=int(scheme.low))
            parts["weight_zero_point"] = np.ascontiguousarray(pack(np.ascontiguousarray(filled), scheme.bits).T)
        return parts
