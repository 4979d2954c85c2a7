"""Error feedback from left to right: what each step of columns loses is made up for by the columns after it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gemma2tool.model.lazy import Array

PANEL = 256
"""Columns whose errors are subtracted from the columns beyond them at once."""

Rounder = Callable[[Array, Tensor, slice], Array]
"""Rounds the columns of a slice, (n, columns), with their factor; returns the errors."""


def feed_back(part: Array, upper: Tensor, width: int, rounder: Rounder) -> None:
    """Calls ``rounder`` for every ``width`` columns of ``part`` (n, I), from left to right, and subtracts what their
    errors cost the columns after them. Overwrites ``part``.
    """
    values, panel = torch.from_numpy(part), max(PANEL // width, 1) * width
    for start in range(0, part.shape[1], panel):
        end = min(start + panel, part.shape[1])
        errors = torch.empty(len(part), end - start)
        for first in range(start, end, width):
            last = min(first + width, end)
            lost = torch.from_numpy(rounder(part[:, first:last], upper[first:last, first:last], slice(first, last)))
            errors[:, first - start : last - start] = lost
            if last < end:
                values[:, last:end].addmm_(lost, upper[first:last, last:end], alpha=-1)
        values[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)
