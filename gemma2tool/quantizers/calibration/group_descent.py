"""Coordinate descent over rounded rows, with all columns in view: what error feedback, which goes from left to right
once, leaves to be gained.

The error of a row is r H r^T, where r is the difference of its values from the source's. Code after code is set to
where that is smallest while the others stay; then scale after scale. No step raises the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gemma2tool.model.lazy import Array
from gemma2tool.quantizers.calibration.group_layouts import GroupCodes, GroupLayout
from gemma2tool.quantizers.calibration.hessian import Factor

BLOCK = 64
"""Columns whose changes reach the columns beyond them at once."""

SINGULAR = 1e-6
"""Determinant, relative to its largest possible value, below which scale and bias are not fitted together."""


def descend(
    rows: Array,
    result: GroupCodes,
    factors: Sequence[Factor],
    layout: GroupLayout,
    sweeps: int,
    *,
    change_scales: bool = True,
) -> None:
    """Improve the codes of float32 rows (n, I) in place, and scales and offsets unless they belong to tiles, ``sweeps``
    times over.
    """
    scales = torch.from_numpy(np.ascontiguousarray(result.scales.T))
    offsets = None if result.offsets is None else torch.from_numpy(np.ascontiguousarray(result.offsets.T))
    parts, begin = list[_Part](), 0
    for factor in factors:
        parts.append(_Part(rows, result.codes, factor, _Scales(layout, scales, offsets), begin))
        begin += len(factor.columns)
    for _ in range(sweeps):
        for part in parts:
            part.choose_codes()
        for group in range(len(scales) if change_scales and layout.tile == 1 else 0):
            _choose_scale(group, [part for part in parts if part.groups[0] <= group <= part.groups[-1]])
    for part in parts:
        result.codes[:, part.order] = part.codes.numpy().T
    result.scales[:] = scales.numpy().T
    if result.offsets is not None and offsets is not None:
        result.offsets[:] = offsets.numpy().T


def fitted_scale(own: Tensor, cross: Tensor) -> Tensor:
    """The change of a scale that leaves the smallest error. ``own``: the square of what a scale of one gives;
    ``cross``: its product with what is left.
    """
    return torch.where(own > 0, cross / torch.where(own > 0, own, 1), 0)


def fitted_scale_and_bias(
    own: Tensor, mixed: Tensor, ones: Tensor, cross: Tensor, cross_one: Tensor
) -> tuple[Tensor, Tensor]:
    """The changes of scale and bias that leave the smallest error together; zeros where they cannot be told apart.

    ``ones``: the square of what a bias of one gives; ``mixed``: its product with what a scale of one gives, and
    ``cross_one`` with what is left.
    """
    determinant = own * ones - mixed * mixed
    usable = determinant > SINGULAR * own * ones
    safe = torch.where(usable, determinant, 1)
    by_scale, by_bias = (cross * ones - cross_one * mixed) / safe, (cross_one * own - cross * mixed) / safe
    return torch.where(usable, by_scale, 0), torch.where(usable, by_bias, 0)


@dataclass(frozen=True)
class _Scales:
    """Scales and offsets (G, n)."""

    layout: GroupLayout
    scales: Tensor
    offsets: Tensor | None

    @property
    def biases(self) -> Tensor | None:
        return None if self.layout.zeros is not None else self.offsets

    def value_of(self, levels: Tensor, group: int) -> Tensor:
        """The values (..., n) of levels in a group."""
        if self.offsets is None:
            return levels * self.scales[group]
        if self.biases is None:
            return (levels + self.offsets[group]) * self.scales[group]
        return levels * self.scales[group] + self.offsets[group]

    def level_of(self, values: Tensor, group: int) -> Tensor:
        """The level, between those that there are, that has these values (n,)."""
        if self.biases is not None:
            values = values - self.biases[group]
        levels = values / torch.where(self.scales[group] == 0, 1, self.scales[group])
        return levels if self.offsets is None or self.biases is not None else levels - self.offsets[group]


class _Part:
    """The columns of one factor, in its order, as the first axis: rounded values and codes (columns, n).

    ``begin``: columns of the factors before it.
    """

    def __init__(self, rows: Array, codes: Array, factor: Factor, scales: _Scales, begin: int) -> None:
        self.scales, self.hessian, self.order = scales, factor.hessian, factor.columns.numpy()
        self.groups = (begin + np.arange(len(self.order))) // scales.layout.width
        self.levels = torch.from_numpy(scales.layout.levels)
        self.middles = (self.levels[1:] + self.levels[:-1]) / 2
        self.codes = torch.from_numpy(np.ascontiguousarray(codes[:, self.order].T))
        source = torch.from_numpy(np.ascontiguousarray(rows[:, self.order].T, np.float32))
        self.values = torch.empty_like(source)
        for column, group in enumerate(self.groups):
            self.values[column] = scales.value_of(self.levels[self.codes[column].int()], int(group))
        self.gradient = self.hessian @ (source - self.values)
        """Minus half the derivative of the error by each value."""

    def choose_codes(self) -> None:
        """Set each code to where the error is smallest."""
        for start in range(0, len(self.values), BLOCK):
            end = min(start + BLOCK, len(self.values))
            inside, gradient = self.hessian[start:end, start:end], self.gradient[start:end]
            changes = torch.empty_like(gradient)
            for j in range(end - start):
                column, group = start + j, int(self.groups[start + j])
                wanted = self.values[column] + gradient[j] / inside[j, j]
                codes = torch.bucketize(self.scales.level_of(wanted, group), self.middles, out_int32=True)
                value = self.scales.value_of(self.levels[codes], group)
                torch.sub(value, self.values[column], out=changes[j])
                self.values[column], self.codes[column] = value, codes
                gradient.addr_(inside[j], changes[j], alpha=-1)
            for beyond in (slice(0, start), slice(end, len(self.values))):
                self.gradient[beyond].addmm_(self.hessian[beyond, start:end], changes, alpha=-1)

    def columns_of(self, group: int) -> slice:
        first, last = np.searchsorted(self.groups, [group, group + 1])
        return slice(int(first), int(last))

    def levels_of(self, group: int) -> Tensor:
        """What a scale of one gives (columns of the group, n)."""
        levels, offsets = self.levels[self.codes[self.columns_of(group)].int()], self.scales.offsets
        return levels if offsets is None or self.scales.biases is not None else levels + offsets[group]

    def sums(self, group: int) -> list[Tensor]:
        """The arguments of ``fitted_scale_and_bias``."""
        columns, levels = self.columns_of(group), self.levels_of(group)
        own, left = self.hessian[columns, columns], self.gradient[columns]
        products = own @ levels
        return [(levels * products).sum(0), products.sum(0), own.sum(), (levels * left).sum(0), left.sum(0)]

    def update(self, group: int) -> None:
        """Follow a scale or bias that has changed."""
        columns = self.columns_of(group)
        value = self.scales.value_of(self.levels[self.codes[columns].int()], group)
        self.gradient.addmm_(self.hessian[:, columns], value - self.values[columns], alpha=-1)
        self.values[columns] = value


def _choose_scale(group: int, parts: Sequence[_Part]) -> None:
    """Set the scale and bias of a group to those that leave the smallest error with the codes as they are."""
    scales = parts[0].scales
    own, mixed, ones, cross, cross_one = (
        sum(terms) for terms in zip(*(part.sums(group) for part in parts), strict=True)
    )
    old, biases, stored = scales.scales[group].clone(), scales.biases, scales.layout.round_scales
    if biases is None:
        new = torch.from_numpy(stored((old + fitted_scale(own, cross)).numpy()))
        change = new - old
        scales.scales[group] = torch.where(change * (2 * cross - change * own) > 0, new, old)
    else:
        old_bias = biases[group].clone()
        by_scale, by_bias = fitted_scale_and_bias(own, mixed, ones, cross, cross_one)
        new, new_bias = (torch.from_numpy(stored(fitted.numpy())) for fitted in (old + by_scale, old_bias + by_bias))
        change, shift = new - old, new_bias - old_bias
        gain = change * (2 * cross - change * own - 2 * shift * mixed) + shift * (2 * cross_one - shift * ones)
        scales.scales[group], biases[group] = torch.where(gain > 0, new, old), torch.where(gain > 0, new_bias, old_bias)
    for part in parts:
        part.update(group)
