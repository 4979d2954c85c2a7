"""AWQ's second step: a group's range may be cut, if finer steps save its outputs more than the cut-off values cost them.

Each group of each row is tried with its range shrunk by twentieths down to a half; what counts is the group's own error e H e^T, H being
its square on the diagonal of the Hessian.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gemma2tool.model.lazy import Array
from gemma2tool.quantizers.calibration.grid import Grid
from gemma2tool.quantizers.calibration.hessian import Hessian
from gemma2tool.quantizers.groups import GroupScales, Rule, dequantize_groups, group_ranges, quantize_groups

SHRINKS = tuple(1 - step / 20 for step in range(11))


@dataclass(frozen=True)
class HessianBlock:
    """What an error in these ``columns`` of a group costs: ``hessian`` (n, n)."""

    group: int
    columns: slice
    hessian: Tensor


def hessian_blocks(hessian: Hessian, width: int, scales: Array | None) -> list[HessianBlock]:
    """The squares on the diagonal of a filled Hessian that groups of ``width`` columns see, of columns scaled by ``scales`` (I,).

    A group wider than the Hessian's own squares has several.
    """
    inverse = None if scales is None else torch.from_numpy(1 / scales)
    found = []
    for square, span in zip(hessian.squares, hessian.spans, strict=True):
        step = min(width, span.stop - span.start)
        for start in range(span.start, span.stop, step):
            columns, inside = slice(start, start + step), slice(start - span.start, start - span.start + step)
            part = square[inside, inside].clone()
            if inverse is not None:
                part *= inverse[columns, None] * inverse[columns]
            found.append(HessianBlock(start // width, columns, part))
    return found


def quantize_clipped(rows: Array, grid: Grid, blocks: Sequence[HessianBlock]) -> tuple[Array, Array, Array]:
    """QuantizedMatrix uint8 (n, I), zeros and scales (n, G) of float32 rows (n, I), to nearest in the best of the ranges tried."""
    low, high = group_ranges(rows, grid.group_size)
    largest = np.maximum(-low, high)
    least = np.full(low.shape, np.inf)
    for shrink in SHRINKS:
        limit = largest * np.float32(shrink)
        zeros, scales = grid.parameters(np.maximum(low, -limit), np.minimum(high, limit))
        loss = _losses(rows, zeros, scales, grid, blocks)
        better = loss < least
        if shrink == SHRINKS[0]:
            best_zeros, best_scales = zeros, scales
        np.copyto(least, loss, where=better)
        np.copyto(best_zeros, zeros, where=better)
        np.copyto(best_scales, scales, where=better)
    return _codes(rows, best_zeros, best_scales, grid), best_zeros, best_scales


def _codes(rows: Array, zeros: Array, scales: Array, grid: Grid) -> Array:
    return quantize_groups(rows, GroupScales(grid.group_size, scales, zeros), Rule.ADD_ZERO, 0, grid.top)


def _losses(rows: Array, zeros: Array, scales: Array, grid: Grid, blocks: Sequence[HessianBlock]) -> Array:
    """What each group of each row costs, float64 (n, G)."""
    codes = _codes(rows, zeros, scales, grid)
    error = torch.from_numpy(dequantize_groups(codes, GroupScales(grid.group_size, scales, zeros)) - rows)
    total = np.zeros(zeros.shape)
    for block in blocks:
        part = error[:, block.columns]
        total[:, block.group] += (part @ block.hessian * part).sum(1).numpy()
    return total
