"""GPTQ (https://arxiv.org/abs/2210.17323): column after column to the nearest code, the error made up for by the columns to come.

With U^T U = H^-1 the best change of the columns after column j is -e_j U[j, j+1:], e_j being column j's error over U[j, j]. Changes
reach the columns of the same block at once and those beyond it a block at a time, as in the paper, so that most of the work is a
product of matrices. A group's zero and scale are made from its columns as they are when the first of them is reached.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gemma2tool.model.lazy import Array, to_float32
from gemma2tool.quantizers.calibration.grid import Grid
from gemma2tool.quantizers.calibration.hessian import Factor

BLOCK = 128
"""Columns of a block, or a group where that is wider."""

ROWS = 1024
"""Rows that are one piece of work: a block of them stays in the second-level cache."""


def round_rows(rows: Array, factors: Sequence[Factor], grid: Grid) -> tuple[Array, Array, Array]:
    """QuantizedMatrix uint8 (n, I), zeros uint8 and scales (n, G) of float rows (n, I), in the factors' precision. Rows are independent.

    Groups are counted in the order of rounding: a column's group is that of ``group_of_column``.
    """
    weight = torch.from_numpy(np.ascontiguousarray(rows.T)).to(factors[0].upper.dtype)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    whole_row = grid.group_size >= len(weight)
    zeros, scales = [], []
    if whole_row:
        zero, scale, *known = _parameters(weight, grid)
        zeros.append(zero)
        scales.append(scale)
    for factor in factors:
        part = weight[factor.columns]
        step = BLOCK if whole_row else max(BLOCK // grid.group_size, 1) * grid.group_size
        for start in range(0, len(part), step):
            block, upper = part[start : start + step], factor.upper[start : start + step, start:]
            errors, rounded = torch.empty_like(block), torch.empty(block.shape, dtype=torch.uint8)
            for column in range(len(block)):
                if not whole_row and column % grid.group_size == 0:
                    zero, scale, *known = _parameters(block[column : column + grid.group_size], grid)
                    zeros.append(zero)
                    scales.append(scale)
                wide_zero, wide_scale = known
                value = block[column]
                code = torch.div(value, wide_scale).round_().add_(wide_zero).clamp_(0, grid.top)
                rounded[column] = code
                error = value.sub(code.sub_(wide_zero).mul_(wide_scale)).div_(upper[column, column])
                errors[column] = error
                block[column + 1 :].addr_(upper[column, column + 1 : len(block)], error, alpha=-1)
            codes[factor.columns[start : start + step]] = rounded
            part[start + step :].addmm_(upper[:, len(block) :].T, errors, alpha=-1)
    return np.ascontiguousarray(codes.numpy().T), np.stack(zeros, 1), np.stack(scales, 1)


def group_of_column(factors: Sequence[Factor], columns: int, width: int) -> Array:
    """The group of each column of a matrix rounded by these factors, int32 (columns,)."""
    groups = np.empty(columns, np.int32)
    groups[np.concatenate([factor.columns.numpy() for factor in factors])] = np.arange(columns) // min(width, columns)
    return groups


def _parameters(columns: Tensor, grid: Grid) -> tuple[Array, Array, Tensor, Tensor]:
    """Zeros and scales of one group (width, n) as stored, and as the arithmetic takes them."""
    low, high = torch.aminmax(columns, dim=0)
    zeros, scales = grid.parameters(low.float().numpy(), high.float().numpy())
    return (
        zeros,
        scales,
        torch.from_numpy(zeros).to(columns.dtype),
        torch.from_numpy(to_float32(scales)).to(columns.dtype),
    )
