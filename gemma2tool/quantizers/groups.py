"""Matrices whose columns share scales in groups: the passes over every value that the round-to-nearest types have in
common.

Each library's module derives the scales and zero points, one per group, by that library's own rule. The kernels here
find the ranges of the groups and apply the scales.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma2tool.model.lazy import BFLOAT16, FLOAT16, FLOAT32, Array, DType, to_float32
from gemma2tool.quantizers.kernels import _native

_ARITHMETIC = {FLOAT32: 0, BFLOAT16: 1, FLOAT16: 2}


class Rule(enum.IntEnum):
    """How a value x becomes a code, given its group's scale s and offset z. Rounding is half to even."""

    DIVIDE = 0
    """round(clamp(x / s + z)), each operation rounded to ``arithmetic``"""
    FLOAT8 = 1
    """float8_e4m3fn(clamp(x / s + z)), each operation rounded to ``arithmetic``"""
    RECIPROCAL = 2
    """clamp(round(x * (1 / s)))"""
    FROM_BIAS = 3
    """clamp(round((x - z) / s))"""
    ADD_ZERO = 4
    """clamp(round(x / s) + z)"""
    FLOAT4 = 5
    """float4_e2m1(x / s), the quotient rounded to ``arithmetic``: of two equally near values the smaller, zeros
    positive, infinity and NaN as zero"""
    FLOAT4_EVEN = 6
    """the same: of two equally near values the one with an even code, zeros with the sign of x, infinity as 6"""


@dataclass(frozen=True)
class GroupScales:
    """The scales of a matrix (n, I) in groups of ``group_size`` columns, the last of which may be shorter.

    ``scales`` and ``offsets`` (None: zero): (n, ceil(I / group_size)), of any dtype; the kernels use them in float32.
    """

    group_size: int
    scales: Array
    offsets: Array | None = None

    @classmethod
    def of_signed_zeros(cls, group_size: int, scales: Array) -> GroupScales:
        """Scales alone, for codes with a -0: an offset is added, and one of 0 would make it 0."""
        return cls(group_size, scales, np.full_like(scales, -0.0))

    def contiguous(self, shape: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Scales and offsets as the kernels take them; raises ValueError where they do not fit a matrix of
        ``shape``."""
        expected = (shape[0], -(-shape[1] // self.group_size))
        for array in (self.scales, self.offsets):
            if array is not None and array.shape != expected:
                raise ValueError(f"{array.shape} does not fit {expected} groups of {self.group_size} columns")
        scales = np.ascontiguousarray(to_float32(self.scales))
        return scales, None if self.offsets is None else np.ascontiguousarray(to_float32(self.offsets))


def kernel_floats(values: Array) -> Array:
    """The array as the kernels take it: C-contiguous, float32 or bfloat16."""
    if values.dtype not in (FLOAT32, BFLOAT16):
        values = to_float32(values)
    return np.ascontiguousarray(values)


def group_ranges(rows: Array, group_size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The smallest and the largest value of each group: (n, I) to float32 (n, ceil(I / group_size)) each."""
    rows = kernel_floats(rows)
    n, columns = rows.shape
    shape = (n, -(-columns // group_size))
    low, high = np.empty(shape, np.float32), np.empty(shape, np.float32)
    _native.group_ranges(
        rows.ctypes.data, rows.dtype == BFLOAT16, n, columns, group_size, low.ctypes.data, high.ctypes.data
    )
    return low, high


def quantize_groups(
    rows: Array, groups: GroupScales, rule: Rule, low: float, high: float, arithmetic: DType = FLOAT32
) -> NDArray[np.uint8]:
    """Quantize (n, I) to codes of one byte, uint8 (n, I), clamped to ``low`` .. ``high``."""
    rows, (scales, offsets) = kernel_floats(rows), groups.contiguous(rows.shape)
    codes = np.empty(rows.shape, np.uint8)
    n, columns = rows.shape
    _native.group_codes(
        rows.ctypes.data,
        rows.dtype == BFLOAT16,
        n,
        columns,
        groups.group_size,
        int(rule),
        _ARITHMETIC[arithmetic],
        scales.ctypes.data,
        0 if offsets is None else offsets.ctypes.data,
        low,
        high,
        codes.ctypes.data,
    )
    return codes


def dequantize_groups(codes: Array, groups: GroupScales) -> NDArray[np.float32]:
    """(code - offset) * scale in float32, of codes int8 or uint8 (n, I)."""
    if codes.dtype not in (np.int8, np.uint8):
        raise ValueError(f"codes must be int8 or uint8, not {codes.dtype}")
    codes, (scales, offsets) = np.ascontiguousarray(codes), groups.contiguous(codes.shape)
    values = np.empty(codes.shape, np.float32)
    n, columns = codes.shape
    _native.group_values(
        codes.ctypes.data,
        codes.dtype == np.int8,
        n,
        columns,
        groups.group_size,
        scales.ctypes.data,
        0 if offsets is None else offsets.ctypes.data,
        values.ctypes.data,
    )
    return values
