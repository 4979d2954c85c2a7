"""GPTQ's layout with codes rounded to nearest: weight = (code - zero) * scale, float16 scales, packed along the input.

For a weight (O, I) the stored arrays are transposed: qweight (I * bits / 32, O), qzeros (I / group_size, O * bits /
32), scales (I / group_size, O), g_idx (I,). The checkpoint format ``gptq`` stores zero - 1, ``gptq_v2`` stores zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gemma2tool.model.lazy import Array, to_float32
from gemma2tool.quantizers.base import Part
from gemma2tool.quantizers.bitpack import pack_words, transposed, unpack_words
from gemma2tool.quantizers.casts import cast
from gemma2tool.quantizers.groups import GroupScales, Rule, dequantize_groups, group_ranges, quantize_groups

CHECKPOINT_FORMATS = ("gptq", "gptq_v2")


def quantize(rows: Array, bits: int, group_size: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """Quantize (n, I) to codes uint8 (n, I), zeros uint8 and scales float16 (n, I / group_size)."""
    zeros, scales = grid(*group_ranges(rows, group_size), bits, symmetric)
    codes = quantize_groups(rows, GroupScales(group_size, scales, zeros), Rule.ADD_ZERO, 0, 2**bits - 1)
    return codes, zeros, scales


def grid(low: Array, high: Array, bits: int, symmetric: bool) -> tuple[Array, Array]:
    """Zeros uint8 and scales float16 of groups from their smallest and largest values, float32 arrays of one shape.

    The zero is derived from the scale as rounded to float16, so that it matches the stored scale. A zero is never 0:
    ``gptq`` would store it as -1, which carries into the neighboring zero where libraries add one to whole words.
    """
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    top = np.float32(2**bits - 1)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    else:
        low = np.minimum(low, -high / (top - 1))
    scales = cast((high - low) / top, np.float16)
    scales[scales == 0] = 1
    zeros = np.full(low.shape, 2 ** (bits - 1)) if symmetric else np.clip(np.rint(-low / to_float32(scales)), 1, top)
    return zeros.astype(np.uint8), scales


def dequantize(codes: Array, zeros: Array, scales: Array, g_idx: Array) -> Array:
    """(code - zero) * scale, float32, exact for float16 scales: (n, I), (n, G), (n, G), (I,) to (n, I)."""
    width = codes.shape[1] // zeros.shape[1]
    if np.array_equal(g_idx, np.arange(codes.shape[1]) // width):
        return dequantize_groups(codes, GroupScales(width, scales, zeros))
    values: Array = (codes.astype(np.float32) - zeros.astype(np.float32)[:, g_idx]) * to_float32(scales)[:, g_idx]
    return values


def unpack_zeros(words: Array, bits: int, checkpoint_format: str) -> Array:
    """Unpack qzeros (G, O * bits / 32) to zeros uint8 (G, O)."""
    zeros = unpack_words(words, bits)
    return (zeros + np.uint8(1)) & np.uint8(2**bits - 1) if checkpoint_format == "gptq" else zeros


@dataclass(frozen=True)
class Gptq:
    """Encoder for ``gptq-4`` and ``gptq-8``, rounded to nearest. ``group_size``: -1 for a whole row."""

    bits: int
    group_size: int = 128
    symmetric: bool = True
    checkpoint_format: str = "gptq"

    lossless: ClassVar[bool] = False
    collects: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    @property
    def name(self) -> str:
        return f"gptq-{self.bits}"

    def columns_per_group(self, columns: int) -> int:
        """How many columns share a scale in rows of this many columns."""
        return columns if self.group_size < 0 else self.group_size

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, columns = shape
        groups, words, zero_words = (
            columns // self.columns_per_group(columns),
            columns * self.bits // 32,
            rows * self.bits // 32,
        )
        return (
            Part("qweight", "I32", (words, rows), words * rows * 4, streamed=False),
            Part("qzeros", "I32", (groups, zero_words), groups * zero_words * 4, streamed=False),
            Part("scales", "F16", (groups, rows), groups * rows * 2, streamed=False),
            Part("g_idx", "I32", (columns,), columns * 4, streamed=False),
        )

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        return 1

    def encode(self, rows: Array) -> Mapping[str, Array]:
        return self.pack(*quantize(rows, self.bits, self.columns_per_group(rows.shape[1]), self.symmetric))

    def pack(self, codes: Array, offsets: Array | None, scales: Array) -> Mapping[str, Array]:
        """The result of ``encode`` for rows that are already quantized; the offsets are zeros, None for those in the
        middle.
        """
        zeros = np.full(scales.shape, 2 ** (self.bits - 1), np.uint8) if offsets is None else offsets
        return {"qweight": pack_words(codes, self.bits), "qzeros": zeros, "scales": scales}

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        zeros = collected["qzeros"]
        if self.checkpoint_format == "gptq":
            zeros = (zeros - np.uint8(1)) & np.uint8(2**self.bits - 1)
        return {
            "qweight": transposed(collected["qweight"]).view(np.int32),
            "qzeros": pack_words(transposed(zeros), self.bits).view(np.int32),
            "scales": transposed(collected["scales"]),
            "g_idx": np.arange(shape[1], dtype=np.int32) // np.int32(self.columns_per_group(shape[1])),
        }
