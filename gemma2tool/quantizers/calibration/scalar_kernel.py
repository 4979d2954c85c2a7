"""The native kernel that rounds groups of columns with error feedback, and what it needs and returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gemma2tool.model.lazy import Array
from gemma2tool.quantizers.kernels import _native

WIDEST = 256
"""The most columns that the kernel takes at once."""


@dataclass(frozen=True)
class Scalars:
    """Rows of a block, rounded.

    ``codes`` uint8 (n, columns): indices of levels. ``scale_choices`` and ``offset_choices`` uint8 (n, groups).
    ``errors`` over the factor's diagonal, float32 (n, columns), and their sums of squares ``losses``, float32 (n,).
    """

    codes: Array
    scale_choices: Array
    offset_choices: Array
    errors: Array
    losses: Array


def round_scalars(
    columns: Array, upper: Tensor, levels: Array, scales: Array, offsets: Array | None, *, are_scaled: bool = False
) -> Scalars:
    """Round float32 rows (n, columns) to ``levels`` (ascending, float32), with the best of the scales and offsets
    (n, groups, candidates), float32, of each group.

    ``upper``: the columns' factor, rows contiguous. ``are_scaled``: offsets are in scales: a value is scale * (level +
    offset).
    """
    n, width = columns.shape
    groups = scales.shape[1]
    values, near = np.ascontiguousarray(columns), np.ascontiguousarray(scales)
    shifts = np.zeros((n, groups, 0), np.float32) if offsets is None else np.ascontiguousarray(offsets)
    result = Scalars(
        np.empty((n, width), np.uint8),
        np.empty((n, groups), np.uint8),
        np.empty((n, groups), np.uint8),
        np.empty((n, width), np.float32),
        np.empty(n, np.float32),
    )
    assert near.dtype == shifts.dtype == values.dtype == levels.dtype == np.float32
    assert width <= WIDEST and upper.stride(1) == 1
    _native.feedback_round_scalars(
        x=values.ctypes.data,
        rows=n,
        stride=width,
        upper=upper.data_ptr(),
        upper_stride=upper.stride(0),
        levels=levels.ctypes.data,
        level_count=len(levels),
        uniform=bool((np.diff(levels) == 1).all()),
        width=width // groups,
        groups=groups,
        scales=near.ctypes.data,
        scale_count=near.shape[2],
        offsets=shifts.ctypes.data if shifts.size else 0,
        offset_count=shifts.shape[2],
        scaled_offsets=are_scaled,
        codes=result.codes.ctypes.data,
        scale_choices=result.scale_choices.ctypes.data,
        offset_choices=result.offset_choices.ctypes.data,
        errors=result.errors.ctypes.data,
        losses=result.losses.ctypes.data,
    )
    return result
