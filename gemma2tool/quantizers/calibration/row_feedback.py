"""Error feedback between the rows of a matrix: rows that are rounded later make up for the errors of earlier ones.

Where the loss of an error E (O, I) of a matrix is tr(G E H E^T), G of its outputs and H of its inputs (YAQA, arXiv
2505.22988), the best change of the rows that follow row i does not depend on H: with U^T U = G^-1 it is
-e_i U[i, i+1:], where e_i is the row's error over U[i, i]. It is the step that GPTQ takes from column to column, and
what is left to do inside a row is GPTQ's. So rows are rounded a few at a time, each as by itself, and their errors are
subtracted from the rows that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from gemma2tool.model.lazy import Array
from gemma2tool.quantizers.calibration import Map
from gemma2tool.quantizers.calibration.grid import Grid
from gemma2tool.quantizers.calibration.hessian import Factor

STEPS = 16
"""Rows are rounded in about this many steps, or more: with fewer, errors are made up for less often."""

PART = 32
"""Rows of a piece of work inside a step: a fixed number, because the products' last bits depend on it."""

LARGEST_STEP = 4 * PART


def round_matrix(
    load: Callable[[int, int], Array],
    grid: Grid,
    groups: Array,
    inputs: Sequence[Factor],
    outputs: Sequence[Factor],
    run: Map = map,
) -> Array:
    """Round a matrix (O, I) to records (O,) of ``grid``.

    ``load(first, last)``: its rows, float32 (n, I). ``groups`` (I,): the group of scales of each column.
    ``inputs``: factors of the columns' inverse Hessian; ``outputs``: of the rows', each of a range of rows, in the
    order of rounding. Rows of different factors are independent.
    """
    if len(outputs) == 1:
        pieces = [_round_rows(load, grid, groups, inputs, outputs[0], run)]
    else:
        pieces = list(run(lambda factor: _round_rows(load, grid, groups, inputs, factor, map), outputs))
    return np.concatenate(pieces)


def _round_rows(
    load: Callable[[int, int], Array],
    grid: Grid,
    groups: Array,
    inputs: Sequence[Factor],
    factor: Factor,
    run: Map,
) -> Array:
    """The records of the factor's rows, in the order of the matrix."""
    order = factor.columns.numpy()
    start, count, upper = int(order.min()), len(order), factor.upper
    rows = torch.from_numpy(load(start, start + count)[order - start])
    records = np.empty(count, grid.record_dtype(rows.shape[1]))
    step = min(max(count // STEPS, 1), LARGEST_STEP)
    for first in range(0, count, step):
        last = min(first + step, count)
        parts = [rows[part : min(part + PART, last)].numpy() for part in range(first, last, PART)]
        rounded = np.concatenate(list(run(lambda part: grid.round_rows(part, inputs), parts)))
        records[order[first:last] - start] = rounded
        if last < count:
            errors = rows[first:last] - torch.from_numpy(grid.values(rounded, groups))
            _subtract(rows[last:], errors, upper[first:last, first:last], upper[first:last, last:])
    return records


def _subtract(following: Tensor, errors: Tensor, own: Tensor, beyond: Tensor) -> None:
    """Let the ``following`` rows make up for the errors of a step, whose part of the factor is ``own`` and ``beyond``
    it.
    """
    scaled = torch.linalg.solve_triangular(own.T, errors, upper=False)
    following.addmm_(beyond.T, scaled, alpha=-1)
