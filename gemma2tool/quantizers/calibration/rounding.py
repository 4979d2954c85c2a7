"""GPTQ (https://arxiv.org/abs/2210.17323): rounds column after column to the nearest code; the columns that follow
absorb the error.

With U^T U = H^-1 the best change of the columns after column j is -e_j U[j, j+1:], where e_j is the error of column j
over U[j, j]. Columns of the same block are changed at once, those beyond it a block at a time, as in the paper, so that
most of the work is matrix products. A group's zero and scale are derived from its columns as they are when its first
column is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gemma2tool.model.lazy import Array, to_float32
from gemma2tool.quantizers.calibration.hessian import Factor

Parameters = Callable[[Array, Array], tuple[Array, Array]]
"""Zeros (uint8) and scales of groups from their smallest and largest values, float32 (n,) each."""


class Affine(Protocol):
    """The values (code - zero) * scale for codes 0 to ``top``, ``group_size`` columns sharing zero and scale."""

    @property
    def top(self) -> int: ...

    @property
    def group_size(self) -> int: ...

    @property
    def parameters(self) -> Parameters: ...


BLOCK = 128
"""Columns of a block; a group that is wider is a block."""

ROWS = 1024
"""Rows in a piece of work: a block of them stays in the second-level cache."""


def round_rows(rows: Array, factors: Sequence[Factor], grid: Affine) -> tuple[Array, Array, Array]:
    """Quantize float rows (n, I) to codes uint8 (n, I), zeros uint8 and scales (n, G), in the factors' precision.

    Rows are independent. Groups are numbered in the order of rounding; ``group_of_column`` gives the group of each
    column.
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


def group_of_column(factors: Sequence[Factor], columns: int, group_size: int) -> Array:
    """The group of each column of a matrix that was rounded with these factors, int32 (columns,)."""
    groups = np.empty(columns, np.int32)
    groups[np.concatenate([factor.columns.numpy() for factor in factors])] = np.arange(columns) // min(
        group_size, columns
    )
    return groups


def _parameters(columns: Tensor, grid: Affine) -> tuple[Array, Array, Tensor, Tensor]:
    """Zeros and scales of one group (group_size, n): as stored, and in the dtype of the arithmetic."""
    low, high = torch.aminmax(columns, dim=0)
    zeros, scales = grid.parameters(low.float().numpy(), high.float().numpy())
    return (
        zeros,
        scales,
        torch.from_numpy(zeros).to(columns.dtype),
        torch.from_numpy(to_float32(scales)).to(columns.dtype),
    )
