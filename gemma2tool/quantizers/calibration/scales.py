"""AWQ (https://arxiv.org/abs/2306.00978): columns that meet large inputs are scaled up before they are rounded to nearest.

The inverse scale goes into whatever produces the inputs. Scales are powers of the inputs' mean magnitude; the power that costs the
output least is found by trying.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gemma2tool.model.lazy import Array
from gemma2tool.quantizers.calibration import Map
from gemma2tool.quantizers.calibration.grid import Grid, quantize_to_nearest
from gemma2tool.quantizers.calibration.hessian import Hessian
from gemma2tool.quantizers.groups import GroupScales, dequantize_groups

POWERS = tuple(step / 20 for step in range(20))
SMALLEST = 1e-4
ROWS = 1024
"""Rows of a matrix that are looked at, evenly spread: a scale belongs to a column, and so many rows tell what it costs."""


def search_scales(weights: Sequence[Array], hessian: Hessian, magnitude: Tensor, grid: Grid, run: Map = map) -> Array:
    """The scales (I,) float32 under which the matrices (n, I) that share these inputs lose least, rounded to nearest.

    ``magnitude`` (I,): mean |x| per column. ``hessian``: of the inputs, filled. A scale of 1 everywhere is among those tried.
    """
    tried = [scales_of_power(magnitude, power) for power in POWERS]
    losses = list(run(lambda scales: sum(output_error(rows, scales, hessian, grid) for rows in weights), tried))
    return tried[int(np.argmin(losses))]


def scales_of_power(magnitude: Tensor, power: float) -> Array:
    """magnitude ** power, over the geometric mean of its largest and smallest."""
    scales = magnitude.double().clamp(min=SMALLEST) ** power
    return (scales / (scales.max() * scales.min()).sqrt()).float().numpy()


def output_error(rows: Array, scales: Array, hessian: Hessian, grid: Grid) -> float:
    """The squared error of the outputs, summed over the text, of float32 rows (n, I) rounded under ``scales``."""
    codes, zeros, steps = quantize_to_nearest(rows * scales, grid)
    error = torch.from_numpy(dequantize_groups(codes, GroupScales(grid.group_size, steps, zeros)) / scales - rows)
    total = 0.0
    for square, span in zip(hessian.squares, hessian.spans, strict=True):
        part = error[:, span]
        total += float((part @ square * part).sum(dtype=torch.float64))
    return total


def sample_rows(rows: int) -> Array:
    """Which rows of a matrix of so many are looked at."""
    return np.unique(np.linspace(0, rows - 1, min(rows, ROWS)).astype(np.int64))
