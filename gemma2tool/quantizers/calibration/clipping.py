"""AWQ's second step: clip a group's range where the smaller scale reduces the output error by more than the clipped
values add.

Each group of each row is tried with its range shrunk in steps of a twentieth, down to a half. The error of a group is e
H e^T, where H is its square on the diagonal of the Hessian.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gemma2tool.model.lazy import Array
from gemma2tool.quantizers.calibration.grid import AffineGrid
from gemma2tool.quantizers.calibration.hessian import Hessian
from gemma2tool.quantizers.groups import GroupScales, Rule, dequantize_groups, group_ranges, quantize_groups

SHRINKS = tuple(1 - step / 20 for step in range(11))


@dataclass(frozen=True)
class HessianBlock:
    """The Hessian (n, n) of ``columns``, which belong to one group."""

    group: int
    columns: slice
    hessian: Tensor


def hessian_blocks(hessian: Hessian, group_size: int, scales: Array | None) -> list[HessianBlock]:
    """The diagonal blocks of a symmetrized Hessian that belong to groups of ``group_size`` columns, which are scaled by
    ``scales`` (I,).

    A group wider than the Hessian's own blocks has several.
    """
    inverse = None if scales is None else torch.from_numpy(1 / scales)
    blocks = []
    for square, span in zip(hessian.squares, hessian.spans, strict=True):
        step = min(group_size, span.stop - span.start)
        for start in range(span.start, span.stop, step):
            columns, inside = slice(start, start + step), slice(start - span.start, start - span.start + step)
            part = square[inside, inside].clone()
            if inverse is not None:
                part *= inverse[columns, None] * inverse[columns]
            blocks.append(HessianBlock(start // group_size, columns, part))
    return blocks


def quantize_clipped(rows: Array, grid: AffineGrid, blocks: Sequence[HessianBlock]) -> tuple[Array, Array, Array]:
    """Quantize float32 rows (n, I) to nearest in the best clipped ranges: codes uint8 (n, I), zeros and scales (n,
    G)."""
    low, high = group_ranges(rows, grid.group_size)
    absmax = np.maximum(-low, high)
    lowest_error = np.full(low.shape, np.inf)
    for shrink in SHRINKS:
        limit = absmax * np.float32(shrink)
        zeros, scales = grid.parameters(np.maximum(low, -limit), np.minimum(high, limit))
        error = _group_errors(rows, zeros, scales, grid, blocks)
        better = error < lowest_error
        if shrink == SHRINKS[0]:
            best_zeros, best_scales = zeros, scales
        np.copyto(lowest_error, error, where=better)
        np.copyto(best_zeros, zeros, where=better)
        np.copyto(best_scales, scales, where=better)
    return _codes(rows, best_zeros, best_scales, grid), best_zeros, best_scales


def _codes(rows: Array, zeros: Array, scales: Array, grid: AffineGrid) -> Array:
    return quantize_groups(rows, GroupScales(grid.group_size, scales, zeros), Rule.ADD_ZERO, 0, grid.top)


def _group_errors(rows: Array, zeros: Array, scales: Array, grid: AffineGrid, blocks: Sequence[HessianBlock]) -> Array:
    """The output error of each group of each row, float64 (n, G)."""
    codes = _codes(rows, zeros, scales, grid)
    error = torch.from_numpy(dequantize_groups(codes, GroupScales(grid.group_size, scales, zeros)) - rows)
    total = np.zeros(zeros.shape)
    for block in blocks:
        part = error[:, block.columns]
        total[:, block.group] += (part @ block.hessian * part).sum(1).numpy()
    return total
