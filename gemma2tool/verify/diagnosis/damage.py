"""Damage in a place: flipped bits, holes, broken blocks, in a tensor that is otherwise the source's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gemma2tool.model.lazy import LazyTensor, row_ranges, to_float32
from gemma2tool.verify.compare.bounds import BOUNDS
from gemma2tool.verify.compare.tensors import cast
from gemma2tool.verify.diagnosis.fit import is_float
from gemma2tool.verify.diagnosis.scales import Pattern
from gemma2tool.verify.diagnosis.search import Case

_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_CHUNK_VALUES = 1 << 20
_FEW = 1e-3  # share of the values up to which damage is damage in a place
_FEW_BLOCKS = 0.3
_STANDS_OUT = 2.0  # times the mean error of sound blocks: that of damaged ones, at least
_FLIPS = 4  # values that may differ in the last bit alone and still count as flipped, not as rounded otherwise


def local(case: Case, name: str) -> Pattern | None:
    """Where the tensor is damaged, if all the rest of it is the source's."""
    source, candidate = case.weights.get(name), case.candidate[name]
    if source is None or source.shape != candidate.shape or not candidate.size:
        return None
    return _values(source, candidate) if is_float(candidate) else _blocks(source, candidate)


@dataclass
class _Differing:
    """What a walk through both tensors adds up."""

    count: int = 0
    bits: int = 0
    """Of the differing values, those that differ in one bit."""
    neighbours: int = 0
    """Those that are the next number of their type."""
    zero: int = 0
    nonfinite: int = 0
    nan: int = 0
    broken: int = -1
    """The first that is not finite."""
    first: int = -1
    last: int = -1


def _values(source: LazyTensor, candidate: LazyTensor) -> Pattern | None:
    found = _Differing()
    width = max(candidate.row_size, 1)
    for first, last in row_ranges(candidate.rows, width, _CHUNK_VALUES):
        got = candidate.load_rows(first, last)
        wanted = cast(source.load_rows(first, last), candidate.stored, got.dtype)
        kind = _UNSIGNED[got.dtype.itemsize]
        left = np.ascontiguousarray(wanted).reshape(-1).view(kind)
        right = np.ascontiguousarray(got).reshape(-1).view(kind)
        where = np.flatnonzero(left != right)
        if not len(where):
            continue
        values = to_float32(np.ascontiguousarray(got).reshape(-1)[where])
        apart = left[where] ^ right[where]
        found.bits += int(np.count_nonzero((apart & (apart - kind(1))) == 0))
        found.neighbours += int(np.count_nonzero(_apart(left[where], right[where]) == 1))
        found.zero += int(np.count_nonzero(values == 0))
        broken = ~np.isfinite(values)
        if broken.any() and found.broken < 0:
            found.broken = first * width + int(where[broken.argmax()])
        found.nonfinite += int(np.count_nonzero(broken))
        found.nan += int(np.count_nonzero(np.isnan(values)))
        found.count += len(where)
        found.first = first * width + int(where[0]) if found.first < 0 else found.first
        found.last = first * width + int(where[-1])
    return _judged(found, candidate)


def _apart(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """How many numbers of the type lie between, for numbers of the same sign."""
    return np.maximum(left, right) - np.minimum(left, right)


def _judged(found: _Differing, candidate: LazyTensor) -> Pattern | None:
    span = found.last - found.first + 1
    at, to = _where(found.first, candidate.shape), _where(found.last, candidate.shape)
    evidence = {"values": found.count, "first": found.first, "last": found.last, "from": at, "to": to}
    nonfinite = _nonfinite(found, candidate)
    if nonfinite is not None and found.nonfinite >= found.count / 2:
        return nonfinite
    few = found.count <= max(_FEW * candidate.size, 8)
    rounding = None
    if found.count and found.neighbours == found.count:
        said = (
            "{what} {are} rounded by another rule: values are the next number of the type to those that must be there"
        )
        rounding = Pattern("numbers.other-rounding", said, evidence)
    if found.count and found.bits == found.count and few and (rounding is None or found.count <= _FLIPS):
        said = (
            f"in {{what}} one bit is flipped at {at}: the file is damaged"
            if found.count == 1
            else f"in {{what}} {found.count} values differ in one bit each, the first at {at}: the file is damaged"
        )
        return Pattern("damage.bit-flip", said, evidence, rounding)
    if rounding is not None:
        return rounding
    compact = found.count and span <= 1.5 * found.count and span < 0.95 * candidate.size
    if compact and found.zero == found.count and found.count > 1:
        said = f"in {{what}} {found.count} values from {at} to {to} are zero: a hole in the file, as an interrupted write leaves"
        return Pattern("damage.hole", said, evidence)
    if found.count == 1:
        said = f"in {{what}} one value, at {at}, is not the source's, and the rest is: the file is damaged there"
        return Pattern("damage.region", said, evidence)
    if compact or (few and found.count):
        said = f"in {{what}} {found.count} values from {at} to {to} are not the source's, and the rest is: the file is damaged there"
        return Pattern("damage.region", said, evidence)
    return nonfinite


def _nonfinite(found: _Differing, candidate: LazyTensor) -> Pattern | None:
    if not found.nonfinite:
        return None
    what = "NaN" if found.nan == found.nonfinite else "NaN or infinite" if found.nan else "infinite"
    at = _where(found.broken, candidate.shape)
    if found.nonfinite == 1:
        said = f"in {{what}} one value at {at} is {what}"
    else:
        said = f"in {{what}} {found.nonfinite} values are {what}, the first at {at}"
    evidence = {"values": found.count, "nonfinite": found.nonfinite, "nan": found.nan, "first": found.broken}
    return Pattern("damage.nonfinite", said, evidence)


def _blocks(source: LazyTensor, candidate: LazyTensor) -> Pattern | None:
    bound = BOUNDS.get(candidate.stored)
    size = bound.block if bound is not None and bound.block else candidate.row_size
    width = max(candidate.row_size, 1)
    total = bad = scaled = nonfinite = 0
    worst, factors = -1, []
    errors = {True: 0.0, False: 0.0}
    limit = 1.5 * bound.relative_rmse if bound is not None else 0.9
    for first, last in row_ranges(candidate.rows, width, _CHUNK_VALUES, size // math.gcd(size, width)):
        ours, theirs = (each.load_rows_f32(first, last).reshape(-1) for each in (source, candidate))
        if len(ours) % size:
            return None
        ours, theirs = ours.reshape(-1, size).astype(np.float64), theirs.reshape(-1, size).astype(np.float64)
        broken = ~np.isfinite(theirs).all(1)
        nonfinite += int(broken.sum())
        theirs[broken] = 0
        square = np.maximum((ours**2).sum(1), 1e-300)
        error = np.sqrt(((theirs - ours) ** 2).sum(1) / square)
        factor = (ours * theirs).sum(1) / square
        rest = np.sqrt(((theirs - factor[:, None] * ours) ** 2).sum(1) / square) / np.maximum(np.abs(factor), 1e-30)
        off = (error > limit) | (np.abs(factor - 1) > max(limit, 8 * limit / math.sqrt(size))) | broken
        for side in errors:
            errors[side] += float(error[off == side].sum())
        total, bad = total + len(off), bad + int(off.sum())
        scaled += int((off & (rest <= limit) & (np.abs(factor) > 1e-6)).sum())
        if off.any():
            worst = first * width // size + int(off.argmax()) if worst < 0 else worst
            factors += [float(factor[off].min()), float(factor[off].max())]
    if not bad or bad > _FEW_BLOCKS * total or errors[True] / bad < _STANDS_OUT * errors[False] / (total - bad):
        return None
    at = _where(worst * size, candidate.shape)
    evidence = {"blocks": bad, "of": total, "block": size, "first": worst, "nonfinite": nonfinite}
    here = f"in {{what}} {bad} of {total} blocks of {size} values, the first at {at},"
    if scaled >= 0.8 * bad:
        said = f"{here} {'are' if bad > 1 else 'is'} off by a factor ({min(factors):.4g} to {max(factors):.4g}): absmax, or scale, is damaged"
        return Pattern("quant.absmax-damaged", said, evidence)
    return Pattern(
        "quant.blocks-damaged",
        f"{here} {'are' if bad > 1 else 'is'} not the source's: the file is damaged there",
        evidence,
    )


def _where(index: int, shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(int(each)) for each in np.unravel_index(index, shape or (1,))) + "]"
