"""AWQ (https://arxiv.org/abs/2306.00978): columns with large inputs are scaled up before they are rounded to nearest.

The inverse scale is folded into the weights that produce the inputs. Scales are powers of the inputs' mean magnitude;
the power with the smallest output error is found by trying.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gemma2tool.model.lazy import Array
from gemma2tool.quantizers.calibration import Map
from gemma2tool.quantizers.calibration.grid import AffineGrid, quantize_to_nearest
from gemma2tool.quantizers.calibration.hessian import Hessian
from gemma2tool.quantizers.groups import GroupScales, dequantize_groups

POWERS = tuple(step / 20 for step in range(20))
SMALLEST_MAGNITUDE = 1e-4
ROWS = 1024
"""How many rows of a matrix are sampled, evenly spread. A scale belongs to a column, so that this many rows show its
effect."""


def search_scales(
    weights: Sequence[Array], hessian: Hessian, magnitude: Tensor, grid: AffineGrid, run: Map = map
) -> Array:
    """The scales, float32 (I,), with the smallest output error of the matrices (n, I) that share these inputs, rounded
    to nearest.

    ``magnitude`` (I,): mean |x| per column. ``hessian``: of the inputs, symmetrized. All scales 1 are among the
    candidates.
    """
    candidates = [scales_of_power(magnitude, power) for power in POWERS]
    errors = list(run(lambda scales: sum(output_error(rows, scales, hessian, grid) for rows in weights), candidates))
    return candidates[int(np.argmin(errors))]


def scales_of_power(magnitude: Tensor, power: float) -> Array:
    """magnitude ** power, float32 (I,), divided by the geometric mean of its largest and smallest value."""
    scales = magnitude.double().clamp(min=SMALLEST_MAGNITUDE) ** power
    normalized: Array = (scales / (scales.max() * scales.min()).sqrt()).float().numpy()
    return normalized


def output_error(rows: Array, scales: Array, hessian: Hessian, grid: AffineGrid) -> float:
    """The squared error of the outputs, summed over the text, of float32 rows (n, I) rounded with ``scales``."""
    codes, zeros, steps = quantize_to_nearest(rows * scales, grid)
    error = torch.from_numpy(dequantize_groups(codes, GroupScales(grid.group_size, steps, zeros)) / scales - rows)
    total = 0.0
    for square, span in zip(hessian.squares, hessian.spans, strict=True):
        part = error[:, span]
        total += float((part @ square * part).sum(dtype=torch.float64))
    return total


def sample_rows(rows: int) -> Array:
    """The indices of the sampled rows of a matrix that has this many rows."""
    return np.unique(np.linspace(0, rows - 1, min(rows, ROWS)).astype(np.int64))
