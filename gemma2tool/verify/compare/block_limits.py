"""The blocks of values that share a scale whose errors are beyond the bound of their type."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gemma2tool.quantizers.bnb_tables import NESTED_BLOCKSIZE
from gemma2tool.quantizers.comparison import BlockErrors, Floats
from gemma2tool.verify.compare.bounds import DYNAMIC_MAP_GAP, Bound

_SLACK = 1.0 + 1e-5
"""Decoding and comparing round in float32; no bound is meant to be sharper than that."""

NEAREST_SHARE = 0.1
"""Share of a tensor's blocks up to which errors beyond rounding to nearest are damage.

Calibration changes codes in nearly every group of a tensor (GPTQ), or in those whose range it clips (AWQ: a fifth of
the groups of 32 in the narrowest tensor seen). If no more than this share of the blocks is beyond rounding to nearest,
the tensor was rounded to nearest, and those blocks are damaged.
"""

MEAN_SHARE = 0.75
"""Share of half a step that the mean error of rounding to nearest stays below."""


def _blocks(values: Floats, block: int) -> Floats:
    """(n, block); the last block of a tensor of another size is padded with zeros."""
    missing = -values.size % block
    if missing:
        values = np.concatenate([values, np.zeros(missing, values.dtype)])
    return values.reshape(-1, block)


@dataclass(frozen=True)
class BadBlock:
    """A block beyond its limit: index of its first value, the error, the limit, and whether it is the anchor's."""

    index: int
    error: float
    limit: float
    is_anchor: bool

    @property
    def excess(self) -> float:
        return self.error - self.limit


@dataclass
class _Count:
    """Blocks beyond one kind of limit, and the worst of them."""

    blocks: int = 0
    worst: BadBlock | None = None

    def note_worst(self, block: BadBlock | None) -> None:
        if block is not None and (self.worst is None or block.excess > self.worst.excess):
            self.worst = block


@dataclass
class BlockLimits:
    """Counts a tensor's blocks beyond ``bound``; ``block``: values in a block.

    A tensor that was rounded to nearest, except for some blocks, must keep to ``bound.nearest`` everywhere. Blocks are
    checked as they come, unless their scales were quantized together (``bound.nested``) or are shared (``bound.tile``):
    their limit depends on neighboring blocks, so they are checked in ``finish``.
    """

    bound: Bound
    block: int
    worst: BadBlock | None = None
    _beyond_bound: _Count = field(default_factory=_Count)
    _beyond_nearest: _Count = field(default_factory=_Count)
    _blocks: int = 0
    _absmax_sum: float = 0.0
    _waiting: list[BlockErrors] = field(default_factory=list)

    def add(self, first: int, errors: BlockErrors) -> None:
        """The next blocks; ``first``: index of their first value."""
        if self.bound.nested or self.bound.tile:
            self._waiting.append(errors)
        else:
            self._check(first, errors, np.zeros(1, np.float32))

    def finish(self) -> int:
        """Number of blocks beyond their limit in the whole tensor; ``worst`` is then the worst of them."""
        if self._waiting:
            errors, self._waiting = BlockErrors.concatenated(self._waiting), []
            scale_error = (
                tile_error(errors.absmax, self.bound) if self.bound.tile else nested_scale_error(errors.absmax)
            )
            self._check(0, errors, scale_error)
        is_damage = not self._beyond_bound.blocks and not self._is_calibrated
        count = self._beyond_nearest if is_damage else self._beyond_bound
        self.worst = count.worst
        return count.blocks

    def allows_mean(self, mean: float, mean_square: float) -> bool:
        """Whether a mean error is possible for rounding to nearest.

        Rounding errors cancel out; those of a zero point that was read by another convention do not. Any mean is
        allowed for types without ``bound.nearest``, and if the blocks keep to it: few distinct values may all round the
        same way.
        """
        if not self._is_calibrated:
            return True
        limit = MEAN_SHARE * self.bound.nearest * self._absmax_sum / self._blocks
        return abs(mean) <= limit or mean**2 <= MEAN_SHARE**2 / 2 * mean_square

    @property
    def _is_calibrated(self) -> bool:
        """Whether codes are known to be calibrated, or too many blocks are beyond rounding to nearest for those to be
        damage.
        """
        return self.bound.is_calibrated or self._beyond_nearest.blocks > NEAREST_SHARE * self._blocks

    def _check(self, first: int, errors: BlockErrors, scale_error: Floats) -> None:
        is_bad, worst = self._beyond(first, errors, self.bound.worst, scale_error)
        if errors.anchor is not None:
            is_bad_anchor, worst_anchor = self._beyond(first, errors, self.bound.anchor, scale_error, is_anchor=True)
            self._beyond_bound.note_worst(worst_anchor)
            is_bad |= is_bad_anchor
        self._beyond_bound.note_worst(worst)
        self._beyond_bound.blocks += int(np.count_nonzero(is_bad))
        is_missed, worst_missed = self._beyond(first, errors, self.bound.nearest, scale_error)
        self._beyond_nearest.note_worst(worst_missed)
        self._beyond_nearest.blocks += int(np.count_nonzero(is_missed))
        self._blocks += errors.absmax.size
        self._absmax_sum += float(errors.absmax.sum(dtype=np.float64))

    def _beyond(
        self, first: int, errors: BlockErrors, fraction: float, scale_error: Floats, *, is_anchor: bool = False
    ) -> tuple[NDArray[np.bool_], BadBlock | None]:
        """Which blocks are beyond ``fraction`` of their absmax, and the worst of them.

        ``scale_error``: what the scale's own error adds to the limit, per block or (1,).
        """
        values = errors.anchor if is_anchor else errors.worst
        if values is None or not math.isfinite(fraction):
            return np.zeros(errors.absmax.size, bool), None
        limits = np.float32(fraction) * errors.absmax + np.float32(self.bound.floor) + scale_error
        limits = limits * np.float32(_SLACK)
        excess = values - limits
        at = int(excess.argmax())
        worst = None
        if excess[at] > 0:
            worst = BadBlock(first + at * self.block, float(values[at]), float(limits[at]), is_anchor)
        return excess > 0, worst


def nested_scale_error(absmax: Floats) -> Floats:
    """The largest error of each block scale after bitsandbytes' double quantization, shape (blocks,).

    Scales minus their mean over the tensor are quantized 256 at a time to the 8-bit dynamic map, relative to the
    largest of them. The CPU library looks codes up in a table and may be one code off, hence a whole gap, not half of
    one.
    """
    centered = np.abs(absmax - absmax.mean(dtype=np.float64).astype(np.float32))
    largest = np.max(_blocks(centered, NESTED_BLOCKSIZE), axis=1)
    return np.repeat(largest * np.float32(DYNAMIC_MAP_GAP), NESTED_BLOCKSIZE)[: absmax.size]


def tile_error(absmax: Floats, bound: Bound) -> Floats:
    """The largest error of each row's values due to larger values in rows that share its scale; ``absmax`` (rows,)."""
    largest = np.max(_blocks(absmax, bound.tile), axis=1)
    return np.repeat(largest * np.float32(bound.tile_floor), bound.tile)[: absmax.size]
