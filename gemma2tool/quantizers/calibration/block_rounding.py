"""Error feedback onto the grids of GGUF's block types.

A block's scales and minima come from the type's own search, on the columns as error feedback has left them, weighted by
what an error of each column costs. Then, group after group, scales and minima near those are tried, codes are chosen
column by column, and the candidate with the smallest error is taken. The error of a choice is GPTQ's own: what remains
when later columns have compensated for it. IQ1 keeps the codes of its search, and the columns after a block compensate
for the block as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gemma2tool.model.lazy import Array
from gemma2tool.quantizers.calibration.block_layouts import LAYOUTS, Fields, Layout, f16, scales_and_offsets
from gemma2tool.quantizers.calibration.feedback import feed_back
from gemma2tool.quantizers.calibration.hessian import Factor
from gemma2tool.quantizers.calibration.rounded import Rounded
from gemma2tool.quantizers.calibration.scalar_kernel import round_scalars
from gemma2tool.quantizers.calibration.vector_layouts import VECTOR_LAYOUTS
from gemma2tool.quantizers.calibration.vector_rounding import round_vectors
from gemma2tool.quantizers.gguf_types import GGUF_TYPES, dequantize, quantize, row_bytes

STEPS = (0, -1, 1, -2, 2, -3, 3, -4, 4, -6, 6, -8, 8)
"""Stored integers near those of the type's search that are tried, for scales and for minima."""

SCALE_FACTORS = (1.0, 0.98, 1.02, 0.96, 1.04, 0.94, 1.06, 0.92, 1.08, 0.9, 1.1, 0.85, 0.8)
FEW_LEVELS_FACTORS = (1.0, *(step / 40 for step in range(39, 5, -1)))
MINIMUM_SHIFTS = (0.0, -0.1, 0.1, -0.2, 0.2, -0.35, 0.35, -0.5, 0.5)
"""The same for float16 scales, and for float16 minima in scales."""

SUPER_FACTORS = (0.97, 1.03, 0.94, 1.06)
"""Scales of super-blocks that are tried besides that of the type's search, relative to it."""

VECTOR_FACTORS = (0.96, 1.04)
"""The same for types whose codes are vectors, which take ten times as long."""


@dataclass(frozen=True)
class Candidates:
    """The scales and the minima that are tried, each (n, groups, candidates) as stored, and the values that they stand
    for, float32.
    """

    fields: Fields
    scales: Array
    offsets: Array | None

    @classmethod
    def near(cls, layout: Layout, fields: Fields) -> Candidates:
        """The candidates near the fields of n blocks, those first."""
        if layout.scale_range is not None:
            scales = _integers_near(fields.scales, layout.scale_range)
        else:
            factors = FEW_LEVELS_FACTORS if len(layout.levels) in (3, 4) else SCALE_FACTORS
            scales = _f16(fields.scales[:, :, None] * np.array(factors, np.float32))
        minima = None
        if fields.minima is not None:
            if layout.minimum_range is not None:
                minima = _integers_near(fields.minima, layout.minimum_range)
            else:
                shifts = np.array(MINIMUM_SHIFTS, np.float32)
                minima = _f16(fields.minima[:, :, None] + shifts * fields.scales[:, :, None])
        near = replace(fields, scales=scales, minima=minima)
        return cls(near, *scales_and_offsets(layout, near))

    def choose(self, scale_choices: Array, offset_choices: Array) -> Fields:
        """The fields of the chosen candidates; choices uint8 (n, groups)."""
        minima = self.fields.minima
        return replace(
            self.fields,
            scales=_take(self.fields.scales, scale_choices),
            minima=None if minima is None else _take(minima, offset_choices),
        )


def _integers_near(values: Array, limits: tuple[int, int]) -> Array:
    near: Array = np.clip(values[:, :, None].astype(np.int16) + np.array(STEPS, np.int16), *limits)
    return near


def _f16(values: Array) -> Array:
    return values.astype(np.float16).astype(np.float32)


def _take(candidates: Array, choices: Array) -> Array:
    taken: Array = np.take_along_axis(candidates, choices[:, :, None].astype(np.intp), 2)[:, :, 0]
    return taken


def round_blocks(type: str, rows: Array, factors: Sequence[Factor]) -> Array:
    """Quantize float32 rows (n, I) to blocks of ``type``, uint8 (n, row bytes). Rows are independent."""
    blocks = []
    for factor in factors:
        first, last = int(factor.columns[0]), int(factor.columns[-1]) + 1
        part = np.array(rows[:, first:last], np.float32, order="C")
        blocks.append(_round_part(type, part, factor.row_major))
    return np.concatenate(blocks, axis=1)


def _round_part(type: str, part: Array, upper: Tensor) -> Array:
    """Rounds the columns of one factor. Overwrites ``part``."""
    width, block_bytes = GGUF_TYPES[type].block_elements, GGUF_TYPES[type].block_bytes
    out = np.empty((len(part), row_bytes(type, part.shape[1])), np.uint8)

    def rounder(columns: Array, upper: Tensor, span: slice) -> Array:
        rounded = round_block(type, columns, upper)
        at = span.start // width * block_bytes
        out[:, at : at + block_bytes] = rounded.blocks
        return rounded.errors

    feed_back(part, upper, width, rounder)
    return out


def round_block(type: str, columns: Array, upper: Tensor) -> Rounded:
    """A block of ``type`` from each row of float32 columns (n, columns of a block). ``upper``: their factor."""
    weights = 1 / np.square(upper.diagonal().numpy())
    searched = quantize(type, np.ascontiguousarray(columns), weights)
    if type in VECTOR_LAYOUTS:
        super_scale, scales = f16(searched, 0), VECTOR_LAYOUTS[type].read_scales(searched)
        return _best(lambda scale: round_vectors(type, columns, upper, scale, scales), super_scale, VECTOR_FACTORS)
    if type not in LAYOUTS:
        return _as_searched(type, columns, upper, searched)
    fields = LAYOUTS[type].read(searched)
    if fields.super_scale is None:
        return _round_near(type, columns, upper, fields)
    return _best(
        lambda scale: _round_near(type, columns, upper, replace(fields, super_scale=scale)),
        fields.super_scale,
        SUPER_FACTORS,
    )


def _best(round_with: Callable[[Array], Rounded], super_scale: Array, factors: Sequence[float]) -> Rounded:
    """The best of each row with ``super_scale`` (n,) and with that times each of ``factors``."""
    best = round_with(super_scale)
    for factor in factors:
        best.improve(round_with(_f16(super_scale * np.float32(factor))))
    return best


def _as_searched(type: str, columns: Array, upper: Tensor, blocks: Array) -> Rounded:
    """The blocks as they are. With a whole block rounded at once, its errors e solve e U = the values' errors."""
    lost = torch.from_numpy(columns - dequantize(type, blocks, columns.shape[1]))
    errors = torch.linalg.solve_triangular(upper, lost, upper=True, left=False).numpy()
    return Rounded(blocks, errors, np.square(errors).sum(1))


def _round_near(type: str, columns: Array, upper: Tensor, fields: Fields) -> Rounded:
    """Blocks whose scales and minima are near ``fields``."""
    layout = LAYOUTS[type]
    candidates, (order, levels) = Candidates.near(layout, fields), layout.ascending
    rounded = round_scalars(columns, upper, levels, candidates.scales, candidates.offsets)
    blocks = np.zeros((len(columns), GGUF_TYPES[type].block_bytes), np.uint8)
    layout.write(blocks, order[rounded.codes], candidates.choose(rounded.scale_choices, rounded.offset_choices))
    return Rounded(blocks, rounded.errors, rounded.losses)
