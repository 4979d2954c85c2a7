"""Local damage: flipped bits, holes and broken blocks in a tensor that otherwise equals the source's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from gemma2tool.model.lazy import Array, LazyTensor, row_ranges, to_float32
from gemma2tool.verify.compare.bounds import BOUNDS
from gemma2tool.verify.compare.rules import cast
from gemma2tool.verify.diagnosis.cause import Json
from gemma2tool.verify.diagnosis.fit import CHUNK_VALUES, UNSIGNED, is_float
from gemma2tool.verify.diagnosis.pattern import Pattern
from gemma2tool.verify.diagnosis.search import Case

_FEW = 1e-3
"""Share of the values up to which damage is local."""
_FEW_BLOCKS = 0.3
_STANDS_OUT = 2.0
"""Damaged blocks have at least this many times the mean error of the others."""
_MAX_FLIPS = 4
"""Values that may differ only in their last bit and still count as flipped, not as rounded differently."""
_UNBOUNDED_LIMIT = 0.9


def local_damage(case: Case, name: str) -> Pattern | None:
    """Where the tensor is damaged, if all the rest of it is the source's."""
    source, candidate = case.weights.get(name), case.candidate[name]
    if source is None or source.shape != candidate.shape or not candidate.size:
        return None
    return _damaged_values(source, candidate) if is_float(candidate) else _damaged_blocks(source, candidate)


# -- float types: bit by bit -------------------------------------------------------------------------------------------


@dataclass
class _Differing:
    """Counts of differing values; ``first``, ``last`` and ``first_nonfinite`` are flat indices, -1: none.

    ``single_bits``: differ in one bit. ``adjacent``: are the next number of the type.
    """

    count: int = 0
    single_bits: int = 0
    adjacent: int = 0
    zero: int = 0
    nonfinite: int = 0
    nan: int = 0
    first_nonfinite: int = -1
    first: int = -1
    last: int = -1

    def add(self, source: Array, candidate: Array, start: int) -> None:
        """Count the differences between flat arrays of one dtype; ``start``: flat index of their first value."""
        unsigned = UNSIGNED[candidate.dtype.itemsize]
        left, right = source.view(unsigned), candidate.view(unsigned)
        where = np.flatnonzero(left != right)
        if not len(where):
            return
        left, right, values = left[where], right[where], to_float32(candidate[where])
        difference = left ^ right
        self.single_bits += int(np.count_nonzero((difference & (difference - unsigned(1))) == 0))
        self.adjacent += int(np.count_nonzero(np.maximum(left, right) - np.minimum(left, right) == 1))
        self.zero += int(np.count_nonzero(values == 0))
        nonfinite = ~np.isfinite(values)
        if nonfinite.any() and self.first_nonfinite < 0:
            self.first_nonfinite = start + int(where[nonfinite.argmax()])
        self.nonfinite += int(np.count_nonzero(nonfinite))
        self.nan += int(np.count_nonzero(np.isnan(values)))
        self.count += len(where)
        self.first = start + int(where[0]) if self.first < 0 else self.first
        self.last = start + int(where[-1])


def _damaged_values(source: LazyTensor, candidate: LazyTensor) -> Pattern | None:
    differing = _Differing()
    width = max(candidate.row_size, 1)
    for first, last in row_ranges(candidate.rows, width, CHUNK_VALUES):
        actual = candidate.load_rows(first, last)
        expected = cast(source.load_rows(first, last), candidate.stored, actual.dtype)
        flat = [np.ascontiguousarray(rows).reshape(-1) for rows in (expected, actual)]
        differing.add(flat[0], flat[1], first * width)
    return _name_damage(differing, candidate)


def _name_damage(differing: _Differing, candidate: LazyTensor) -> Pattern | None:
    count, nonfinite = differing.count, _nonfinite(differing, candidate)
    if nonfinite is not None and differing.nonfinite >= count / 2:
        return nonfinite
    if not count:
        return None
    first, last = _position(differing.first, candidate.shape), _position(differing.last, candidate.shape)
    evidence: dict[str, Json] = {
        "values": count,
        "first": differing.first,
        "last": differing.last,
        "from": first,
        "to": last,
    }
    few = count <= max(_FEW * candidate.size, 8)
    rounding = None
    if differing.adjacent == count:
        template = "{what} {are} rounded by another rule: the values are next to the correct ones"
        rounding = Pattern("numbers.other-rounding", template, evidence)
    if differing.single_bits == count and few and (rounding is None or count <= _MAX_FLIPS):
        flipped = (
            f"one bit is flipped at {first}"
            if count == 1
            else f"one bit is flipped in each of {count} values, first at {first}"
        )
        return Pattern("damage.bit-flip", f"in {{what}}, {flipped}: the file is damaged", evidence, rounding)
    if rounding is not None:
        return rounding
    span = differing.last - differing.first + 1
    compact = span <= 1.5 * count and span < 0.95 * candidate.size
    if compact and differing.zero == count > 1:
        template = f"in {{what}}, {count} values from {first} to {last} are zero: the file has a hole there"
        return Pattern("damage.hole", template, evidence)
    if compact or few or count == 1:
        where = f"one value, at {first}, differs" if count == 1 else f"{count} values from {first} to {last} differ"
        template = f"in {{what}}, {where} from the source, and the rest is equal: the file is damaged there"
        return Pattern("damage.region", template, evidence)
    return nonfinite


def _nonfinite(differing: _Differing, candidate: LazyTensor) -> Pattern | None:
    if not differing.nonfinite:
        return None
    word = "NaN" if differing.nan == differing.nonfinite else "NaN or infinite" if differing.nan else "infinite"
    first = _position(differing.first_nonfinite, candidate.shape)
    if differing.nonfinite == 1:
        template = f"in {{what}}, one value at {first} is {word}"
    else:
        template = f"in {{what}}, {differing.nonfinite} values are {word}, the first at {first}"
    evidence = {
        "values": differing.count,
        "nonfinite": differing.nonfinite,
        "nan": differing.nan,
        "first": differing.first_nonfinite,
    }
    return Pattern("damage.nonfinite", template, evidence)


# -- quantized types: block by block -----------------------------------------------------------------------------------


@dataclass
class _Blocks:
    """Counts of blocks; ``size``: values in one, ``limit``: the relative error of a sound one.

    ``damaged_error``, ``sound_error``: sums of relative errors. ``scaled``: damaged blocks that are the source's times
    a factor. ``first``: index of the first damaged block, -1: none.
    """

    size: int
    limit: float
    total: int = 0
    damaged: int = 0
    scaled: int = 0
    nonfinite: int = 0
    damaged_error: float = 0.0
    sound_error: float = 0.0
    first: int = -1
    factors: list[float] = field(default_factory=list)

    def add(self, source: Array, candidate: Array) -> None:
        """Count the blocks of flat float32 values."""
        source, candidate = (rows.reshape(-1, self.size).astype(np.float64) for rows in (source, candidate))
        broken = ~np.isfinite(candidate).all(1)
        candidate[broken] = 0
        square = np.maximum((source**2).sum(1), 1e-300)
        error = np.sqrt(((candidate - source) ** 2).sum(1) / square)
        factor = (source * candidate).sum(1) / square
        rest = np.sqrt(((candidate - factor[:, None] * source) ** 2).sum(1) / square)
        rest /= np.maximum(np.abs(factor), 1e-30)
        factor_limit = max(self.limit, 8 * self.limit / math.sqrt(self.size))
        damaged = (error > self.limit) | (np.abs(factor - 1) > factor_limit) | broken
        if damaged.any():
            self.first = self.total + int(damaged.argmax()) if self.first < 0 else self.first
            self.factors += [float(factor[damaged].min()), float(factor[damaged].max())]
        self.nonfinite += int(broken.sum())
        self.damaged_error += float(error[damaged].sum())
        self.sound_error += float(error[~damaged].sum())
        self.scaled += int((damaged & (rest <= self.limit) & (np.abs(factor) > 1e-6)).sum())
        self.total, self.damaged = self.total + len(damaged), self.damaged + int(damaged.sum())

    @property
    def stand_out(self) -> bool:
        """Whether there are some damaged blocks, few, and clearly worse than the others."""
        if not self.damaged or self.damaged > _FEW_BLOCKS * self.total:
            return False
        sound = self.sound_error / (self.total - self.damaged)
        return self.damaged_error / self.damaged >= _STANDS_OUT * sound


def _damaged_blocks(source: LazyTensor, candidate: LazyTensor) -> Pattern | None:
    bound = BOUNDS.get(candidate.stored)
    size = bound.block if bound is not None and bound.block else candidate.row_size
    width = max(candidate.row_size, 1)
    blocks = _Blocks(size, 1.5 * bound.relative_rmse if bound is not None else _UNBOUNDED_LIMIT)
    for first, last in row_ranges(candidate.rows, width, CHUNK_VALUES, size // math.gcd(size, width)):
        flat = [tensor.load_rows_f32(first, last).reshape(-1) for tensor in (source, candidate)]
        if len(flat[0]) % size:
            return None
        blocks.add(flat[0], flat[1])
    if not blocks.stand_out:
        return None
    position = _position(blocks.first * size, candidate.shape)
    where = f"in {{what}}, {blocks.damaged} of {blocks.total} blocks of {size} values, the first at {position},"
    verb = "are" if blocks.damaged > 1 else "is"
    if blocks.scaled >= 0.8 * blocks.damaged:
        id = "quant.absmax-damaged"
        factors = f"{min(blocks.factors):.4g} to {max(blocks.factors):.4g}"
        template = f"{where} {verb} wrong by a factor ({factors}): the block's scale (absmax) is damaged"
    else:
        id = "quant.blocks-damaged"
        template = f"{where} {'differ' if blocks.damaged > 1 else 'differs'} from the source: the file is damaged there"
    evidence = {
        "blocks": blocks.damaged,
        "of": blocks.total,
        "block": size,
        "first": blocks.first,
        "nonfinite": blocks.nonfinite,
    }
    return Pattern(id, template, evidence)


def _position(index: int, shape: tuple[int, ...]) -> str:
    """A flat index as the indices of the axes: "[17, 33]"."""
    return "[" + ", ".join(str(int(axis)) for axis in np.unravel_index(index, shape or (1,))) + "]"
