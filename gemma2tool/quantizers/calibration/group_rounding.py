"""Error feedback onto types whose groups of columns, or whose rows, have a scale and perhaps an offset.

A group starts from the type's own rule, on the columns as error feedback has left them. Scales and offsets near that
are tried, each with the codes that feedback gives; then scale and offset are fitted to the codes by least squares, and
the codes chosen again, as long as the error falls. The error of a choice is GPTQ's own: what remains when later columns
have compensated for it. A scale that belongs to a whole row is tried on the whole row. At the end the row is gone
through again with all columns in view (see ``group_descent``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gemma2tool.model.lazy import Array
from gemma2tool.quantizers.bnb import NestedScales
from gemma2tool.quantizers.calibration.feedback import feed_back
from gemma2tool.quantizers.calibration.group_descent import descend, fitted_scale, fitted_scale_and_bias
from gemma2tool.quantizers.calibration.group_layouts import GroupCodes, GroupLayout
from gemma2tool.quantizers.calibration.hessian import Factor
from gemma2tool.quantizers.calibration.scalar_kernel import WIDEST, Scalars, round_scalars

FACTORS = (1.0, 0.97, 1.03, 0.94, 1.06, 0.91, 0.88, 0.85, 0.82, 0.79, 0.76, 0.73, 0.7)
"""Scales that are tried, relative to the type's own."""

FINE_FACTORS = (1.0, 0.99, 1.01, 0.98, 1.02)
"""The same, relative to fitted ones."""

SHIFTS = (0.0, -0.15, 0.15, -0.3, 0.3, -0.5, 0.5, -0.75, 0.75, 1.0, -1.0)
"""Biases that are tried, in scales from the type's own."""

FINE_SHIFTS = (0.0, -0.06, 0.06, -0.15, 0.15)

ZERO_STEPS = (0, -1, 1, -2, 2)
"""Zero points that are tried, from the type's own."""

FITS = 2
"""How often scale and offset are fitted to the codes."""

SWEEPS = 2
"""How often codes and scales are gone through at the end. A third time gains a hundredth."""

WIDE_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)
"""Scales of whole rows that are tried, relative to the type's own."""

FEW_LEVELS = 32
"""The most levels for which they are tried."""

BLOCK = 128
"""Columns of a row with one scale that are rounded at once."""


@dataclass
class _Group:
    """Rounded columns of one group: ``codes`` uint8 and ``errors`` (n, columns); ``scales``, ``offsets`` (None if the
    type has none) and ``losses`` (n,).
    """

    codes: Array
    errors: Array
    losses: Array
    scales: Array
    offsets: Array | None

    def improve(self, other: _Group) -> bool:
        """Take the rows that ``other`` rounds with smaller errors; whether there are any."""
        better = other.losses < self.losses
        self.codes[better], self.errors[better] = other.codes[better], other.errors[better]
        self.losses[better], self.scales[better] = other.losses[better], other.scales[better]
        if self.offsets is not None and other.offsets is not None:
            self.offsets[better] = other.offsets[better]
        return bool(better.any())


def round_groups(rows: Array, factors: Sequence[Factor], layout: GroupLayout) -> GroupCodes:
    """Quantize float32 rows (n, I) to ``layout``. Rows are independent, except for those of a tile. Groups are numbered
    in the order of rounding. Where scales are themselves quantized, the first row is a multiple of ROWS in its matrix.
    """
    choose = _round_by_group if has_own_scales(layout, factors) else _round_with_fixed_scales
    codes = choose(rows, factors, layout)
    descend(rows, codes, factors, layout, SWEEPS)
    if layout.nested_offset is not None:
        codes.nested = NestedScales.of(codes.scales, layout.nested_offset)
        codes.scales = codes.nested.values(layout.nested_offset)
        descend(rows, codes, factors, layout, 1, change_scales=False)
    return codes


def has_own_scales(layout: GroupLayout, factors: Sequence[Factor]) -> bool:
    """Whether a scale can be chosen when error feedback comes to its columns: they are few, all of one factor, and of
    one row.
    """
    narrowest = min(len(factor.columns) for factor in factors)
    is_split = len(factors) > 1 and layout.width > narrowest
    return layout.width <= WIDEST and layout.tile == 1 and not is_split


def _parts(rows: Array, factors: Sequence[Factor]) -> Iterator[tuple[Array, Array, Tensor]]:
    """The columns of each factor: their indices, a copy of their values in the order of rounding, and the factor."""
    for factor in factors:
        order = factor.columns.numpy()
        yield order, np.ascontiguousarray(rows[:, order], np.float32), factor.row_major


def _round_by_group(rows: Array, factors: Sequence[Factor], layout: GroupLayout) -> GroupCodes:
    codes, groups = np.empty(rows.shape, np.uint8), list[_Group]()
    for order, part, upper in _parts(rows, factors):

        def rounder(columns: Array, upper: Tensor, span: slice, order: Array = order) -> Array:
            group = _round_group(np.ascontiguousarray(columns), upper, layout)
            codes[:, order[span]] = group.codes
            groups.append(replace(group, codes=group.codes[:, :0], errors=group.errors[:, :0]))
            return group.errors

        feed_back(part, upper, layout.width, rounder)
    offsets = [group.offsets for group in groups if group.offsets is not None]
    return GroupCodes(codes, np.stack([group.scales for group in groups], 1), np.stack(offsets, 1) if offsets else None)


def _round_group(columns: Array, upper: Tensor, layout: GroupLayout) -> _Group:
    scales, offsets = layout.start(columns.min(1), columns.max(1))
    best = _best_near(columns, upper, layout, scales, offsets, coarse=True)
    inverse = torch.linalg.inv(upper.double())
    for _ in range(FITS):
        scales, offsets = _fitted(columns, best, inverse, layout)
        if not best.improve(_best_near(columns, upper, layout, scales, offsets, coarse=False)):
            break
    return best


def _best_near(
    columns: Array, upper: Tensor, layout: GroupLayout, scales: Array, offsets: Array | None, *, coarse: bool
) -> _Group:
    """The best of the scales and offsets near these, (n,) each."""
    near = layout.round_scales(scales[:, None] * np.array(FACTORS if coarse else FINE_FACTORS, np.float32))
    moved = None
    if offsets is not None and layout.zeros is not None:
        moved = np.clip(offsets[:, None] + np.array(ZERO_STEPS, np.float32), *layout.zeros)
    elif offsets is not None:
        shifts = np.array(SHIFTS if coarse else FINE_SHIFTS, np.float32)
        moved = layout.round_scales(offsets[:, None] + scales[:, None] * shifts)
    rounded = _kernel(columns, upper, layout, near, moved)
    return _Group(
        rounded.codes,
        rounded.errors,
        rounded.losses,
        np.take_along_axis(near, rounded.scale_choices.astype(np.intp), 1)[:, 0],
        None if moved is None else np.take_along_axis(moved, rounded.offset_choices.astype(np.intp), 1)[:, 0],
    )


def _kernel(columns: Array, upper: Tensor, layout: GroupLayout, scales: Array, offsets: Array | None) -> Scalars:
    """The columns (n, width) of one group, with scales and offsets (n, candidates)."""
    return round_scalars(
        columns,
        upper,
        layout.levels,
        scales[:, None],
        None if offsets is None else offsets[:, None],
        are_scaled=layout.zeros is not None,
    )


def _fitted(columns: Array, group: _Group, inverse: Tensor, layout: GroupLayout) -> tuple[Array, Array | None]:
    """Scales and offsets (n,) with the smallest error for the codes as they are; zero points stay. ``inverse``: of the
    factor, so that errors are differences times it.
    """
    levels, scales = layout.levels[group.codes], group.scales[:, None]
    biases = None if layout.zeros is not None or group.offsets is None else group.offsets
    if layout.zeros is not None and group.offsets is not None:
        levels = levels + group.offsets[:, None]
    lost = columns - scales * levels if biases is None else columns - (scales * levels + biases[:, None])
    left, given = (torch.from_numpy(values).double() @ inverse for values in (lost, levels))
    one = inverse.sum(0)
    own, cross = (given * given).sum(1), (given * left).sum(1)
    if biases is None:
        return group.scales + fitted_scale(own, cross).float().numpy(), group.offsets
    by_scale, by_bias = fitted_scale_and_bias(own, given @ one, (one * one).sum(), cross, left @ one)
    return group.scales + by_scale.float().numpy(), layout.round_scales(biases + by_bias.float().numpy())


def _round_with_fixed_scales(rows: Array, factors: Sequence[Factor], layout: GroupLayout) -> GroupCodes:
    """Scales of whole rows and of tiles, from the rows as they are: the type's own, or for few levels the best of those
    near them.
    """
    scales, offsets = layout.start(*layout.ranges(rows))
    best: GroupCodes | None = None
    for factor in WIDE_FACTORS if len(layout.levels) <= FEW_LEVELS else WIDE_FACTORS[:1]:
        near = layout.round_scales(scales * np.float32(factor))
        codes, losses = _round_with(rows, factors, layout, near, offsets)
        if best is None:
            best, least = GroupCodes(codes, near, offsets), losses
            continue
        better = losses < least
        best.codes[better], best.scales[better], least[better] = codes[better], near[better], losses[better]
    assert best is not None
    return best


def _round_with(
    rows: Array, factors: Sequence[Factor], layout: GroupLayout, scales: Array, offsets: Array | None
) -> tuple[Array, Array]:
    """Codes (n, I) with these scales and offsets (n, G), and the sums of squares of the errors (n,)."""
    codes, losses = np.empty(rows.shape, np.uint8), np.zeros(len(rows), np.float32)
    width, begin = min(layout.width, BLOCK), 0
    for order, part, upper in _parts(rows, factors):

        def rounder(columns: Array, upper: Tensor, span: slice, order: Array = order, begin: int = begin) -> Array:
            group = slice((begin + span.start) // layout.width, (begin + span.start) // layout.width + 1)
            shifts = None if offsets is None else offsets[:, group]
            rounded = _kernel(np.ascontiguousarray(columns), upper, layout, scales[:, group], shifts)
            codes[:, order[span]] = rounded.codes
            losses[:] += rounded.losses
            return rounded.errors

        feed_back(part, upper, width, rounder)
        begin += part.shape[1]
    return codes, losses
