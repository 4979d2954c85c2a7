"""AWQ's "gemm" layout with codes rounded to nearest: weight = (code - zero) * scale, float16 scales, four bits, packed
along the output.

For a weight (O, I) the stored arrays are transposed: qweight (I, O / 8), qzeros (I / group_size, O / 8), scales (I /
group_size, O). A word holds eight outputs in the order 0 2 4 6 1 3 5 7, as its GPU kernel unpacks them. Zeros are
stored unchanged.
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

BITS = 4
PER_WORD = 8
_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_TOP = 2**BITS - 1
_SMALLEST_RANGE = np.float32(1e-5)  # as in AutoAWQ: the scale of a group of zeros


def quantize(rows: Array, group_size: int) -> tuple[Array, Array, Array]:
    """Quantize (n, I) to codes uint8 (n, I), zeros uint8 and scales float16 (n, I / group_size). Every group's range
    includes zero."""
    zeros, scales = grid(*group_ranges(rows, group_size))
    codes = quantize_groups(rows, GroupScales(group_size, scales, zeros), Rule.ADD_ZERO, 0, _TOP)
    return codes, zeros, scales


def grid(low: Array, high: Array) -> tuple[Array, Array]:
    """Zeros uint8 and scales float16 of groups from their smallest and largest values, float32 arrays of one shape."""
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scales = cast(np.maximum(high - low, _SMALLEST_RANGE) / np.float32(_TOP), np.float16)
    return np.clip(np.rint(-low / to_float32(scales)), 0, _TOP).astype(np.uint8), scales


def dequantize(codes: Array, zeros: Array, scales: Array, group_size: int) -> Array:
    """(code - zero) * scale, float32, exact for float16 scales: (n, I), (n, G), (n, G) to (n, I)."""
    return dequantize_groups(codes, GroupScales(group_size, scales, zeros))


def pack(codes: Array) -> Array:
    """Pack codes (O, m) into words (O / 8, m), eight rows to a word. O is a multiple of 8."""
    rows, columns = codes.shape
    octets = codes.reshape(rows // PER_WORD, PER_WORD, columns)[:, _ORDER]
    return pack_words(np.ascontiguousarray(octets.swapaxes(1, 2)), BITS)[..., 0].view(np.int32)


def unpack(words: Array) -> Array:
    """The inverse of ``pack``."""
    octets = np.empty((words.shape[0], PER_WORD, words.shape[1]), np.uint8)
    octets[:, _ORDER] = unpack_words(np.ascontiguousarray(words)[..., None], BITS).swapaxes(1, 2)
    return octets.reshape(-1, words.shape[1])


@dataclass(frozen=True)
class Awq:
    """Encoder for ``awq-4``, rounded to nearest. ``group_size``: -1 for a whole row."""

    group_size: int = 128

    name: ClassVar[str] = "awq-4"
    lossless: ClassVar[bool] = False
    collects: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    def columns_per_group(self, columns: int) -> int:
        """How many columns share a scale in rows of this many columns."""
        return columns if self.group_size < 0 else self.group_size

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, columns = shape
        groups, words = columns // self.columns_per_group(columns), rows // PER_WORD
        return (
            Part("qweight", "I32", (columns, words), columns * words * 4, streamed=False),
            Part("qzeros", "I32", (groups, words), groups * words * 4, streamed=False),
            Part("scales", "F16", (groups, rows), groups * rows * 2, streamed=False),
        )

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        return PER_WORD

    def encode(self, rows: Array) -> Mapping[str, Array]:
        return self.pack(*quantize(rows, self.columns_per_group(rows.shape[1])))

    def pack(self, codes: Array, offsets: Array | None, scales: Array) -> Mapping[str, Array]:
        """The result of ``encode`` for rows that are already quantized; the offsets are zeros."""
        assert offsets is not None
        return {"qweight": pack(codes), "qzeros": pack(offsets), "scales": scales}

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        return {suffix: transposed(array) for suffix, array in collected.items()}
