"""Matrices whose columns share scales in groups: the passes over every value that the round-to-nearest types have in common.

Scales and zero points, one a group, are made by each library's own rule in its module; the kernels here find the ranges they follow
from and apply them.
"""

from __future__ import annotations

import enum

import numpy as np

from gemma2tool.model.lazy import BFLOAT16, FLOAT16, FLOAT32, to_float32
from gemma2tool.quantizers.kernels import _native

_ARITHMETIC = {FLOAT32: 0, BFLOAT16: 1, FLOAT16: 2}


class Rule(enum.IntEnum):
    """How a value x becomes a code, given its group's scale s and offset z; rounding is half to even."""

    DIVIDE = 0
    """round(clamp(x / s + z)), every operation rounded to ``arithmetic``"""
    FLOAT8 = 1
    """float8_e4m3fn(clamp(x / s + z)), likewise"""
    RECIPROCAL = 2
    """clamp(round(x * (1 / s)))"""
    FROM_BIAS = 3
    """clamp(round((x - z) / s))"""
    ADD_ZERO = 4
    """clamp(round(x / s) + z)"""


def kernel_floats(values: np.ndarray) -> np.ndarray:
    """The array as the kernels take it: C-contiguous, float32 or bfloat16."""
    if values.dtype not in (FLOAT32, BFLOAT16):
        values = to_float32(values)
    return np.ascontiguousarray(values)


def ranges(rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest value of each group of ``width`` columns: (n, I) to float32 (n, ceil(I / width)) each."""
    rows = kernel_floats(rows)
    shape = (rows.shape[0], -(-rows.shape[1] // width))
    low, high = np.empty(shape, np.float32), np.empty(shape, np.float32)
    _native.group_ranges(
        rows.ctypes.data, rows.dtype == BFLOAT16, *rows.shape, width, low.ctypes.data, high.ctypes.data
    )
    return low, high


def codes(
    rows: np.ndarray,
    width: int,
    rule: Rule,
    scales: np.ndarray,
    offsets: np.ndarray | None,
    low: float,
    high: float,
    arithmetic: np.dtype = FLOAT32,
) -> np.ndarray:
    """A byte a value, clamped to ``low`` .. ``high``: (n, I) with scales and offsets (n, ceil(I / width)) to uint8 (n, I)."""
    rows, scales, offsets = kernel_floats(rows), *_by_group(rows.shape, width, scales, offsets)
    result = np.empty(rows.shape, np.uint8)
    _native.group_codes(
        rows.ctypes.data,
        rows.dtype == BFLOAT16,
        *rows.shape,
        width,
        int(rule),
        _ARITHMETIC[arithmetic],
        scales.ctypes.data,
        0 if offsets is None else offsets.ctypes.data,
        low,
        high,
        result.ctypes.data,
    )
    return result


def values(codes: np.ndarray, width: int, scales: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
    """(code - offset) * scale in float32: int8 or uint8 (n, I) with scales and offsets (n, ceil(I / width)) to (n, I)."""
    if codes.dtype not in (np.int8, np.uint8):
        raise ValueError(f"codes of {codes.dtype}")
    codes, (scales, offsets) = np.ascontiguousarray(codes), _by_group(codes.shape, width, scales, offsets)
    result = np.empty(codes.shape, np.float32)
    _native.group_values(
        codes.ctypes.data,
        codes.dtype == np.int8,
        *codes.shape,
        width,
        scales.ctypes.data,
        0 if offsets is None else offsets.ctypes.data,
        result.ctypes.data,
    )
    return result


def _by_group(
    shape: tuple[int, ...], width: int, scales: np.ndarray, offsets: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    expected = (shape[0], -(-shape[1] // width))
    for array in (scales, offsets):
        if array is not None and array.shape != expected:
            raise ValueError(f"{array.shape} where {expected} groups of {width} columns are")
    as_floats = (None if array is None else np.ascontiguousarray(to_float32(array)) for array in (scales, offsets))
    return tuple(as_floats)
