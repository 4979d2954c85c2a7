"""The arithmetic under the tensor comparison: one range of rows in, sums and counts out, and their addition.

Nothing here knows names, types or messages. Arrays are never larger than the range; sums are kept in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from gemma2tool.model.lazy import to_float32
from gemma2tool.quantizers.bnb_tables import NESTED_BLOCKSIZE
from gemma2tool.verify.compare.bounds import DYNAMIC_MAP_GAP, Bound

# Decoding and comparing round in float32; no bound is meant to be that sharp.
_SLACK = 1.0 + 1e-5

# Calibration moves codes in nearly every group of a tensor (GPTQ), or in those whose range it cuts (AWQ: a fifth of groups of 32 in
# the narrowest tensor seen). Where no more than this share of the blocks is farther from the source than rounding to nearest puts them,
# the tensor was rounded to nearest, and those blocks are damaged.
NEAREST_SHARE = 0.1

# Of half a step, as rounding to nearest leaves: a mean error larger than that is no rounding.
LEANING = 0.75

_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass
class Piece:
    """What a range of rows adds to its tensor's comparison. Indexes are flat, counted from the piece's first value."""

    values: int
    signal: float = 0.0
    """Sum of the squares of the source's values."""
    noise: float = 0.0
    """Sum of the squares of the errors."""
    bias: float = 0.0
    """Sum of the errors, with their signs."""
    max_abs_error: float = 0.0
    nonfinite: int = 0
    source_nonfinite: int = 0
    first_nonfinite: int = -1
    differing: int = 0
    first_difference: tuple[int, float, float] = (-1, 0.0, 0.0)
    """Index, the value it must have, the value it has."""
    absmax: np.ndarray | None = None
    """Per block: the largest magnitude in the source."""
    worst: np.ndarray | None = None
    """Per block: the largest error."""
    anchor: np.ndarray | None = None
    """Per block: the error of the value of largest magnitude; None where the type promises nothing of it."""
    source_leaves: bytes = b""
    candidate_leaves: bytes = b""
    """What ``hashing.leaves`` says of each side's rows."""


def measure_bits(wanted: np.ndarray, got: np.ndarray, source: Callable[[], np.ndarray] | None) -> Piece:
    """Compare two arrays of one dtype bit for bit.

    ``source``: gives the float32 values that errors are measured against; None where they are ``wanted``, and then
    nothing is measured while the bits agree.
    """
    piece = Piece(got.size)
    unsigned = _UNSIGNED[got.dtype.itemsize]
    left = np.ascontiguousarray(wanted).reshape(-1).view(unsigned)
    right = np.ascontiguousarray(got).reshape(-1).view(unsigned)
    equal = np.array_equal(left, right)
    if not equal:
        unequal = left != right
        at = int(unequal.argmax())
        piece.differing = int(np.count_nonzero(unequal))
        piece.first_difference = (at, float(wanted.reshape(-1)[at]), float(got.reshape(-1)[at]))
    values = to_float32(got).reshape(-1)
    if equal and source is None:
        piece.signal = _squares(values)
        if not np.isfinite(piece.signal):
            _count_nonfinite(piece, values, values)
        return piece
    _measure_errors(piece, (to_float32(wanted) if source is None else source()).reshape(-1), values)
    return piece


def measure_blocks(source: np.ndarray, got: np.ndarray, block: int, bound: Bound | None) -> Piece:
    """Errors of float32 ``got`` against float32 ``source``, and, where there is a bound, per block of ``block``
    values."""
    source, got = source.reshape(-1), got.reshape(-1)
    piece = Piece(got.size)
    errors = _measure_errors(piece, source, got)
    if bound is not None:
        magnitudes = _blocks(np.abs(source), block)
        errors = _blocks(errors, block)
        piece.absmax, piece.worst = _largest(magnitudes), _largest(errors)
        if math.isfinite(bound.anchor):
            # Of equal magnitudes the first; numpy finds the first True of a row several times faster than its largest float.
            at = (magnitudes == piece.absmax[:, None]).argmax(axis=1)
            piece.anchor = errors[np.arange(at.size), at]
    return piece


def _measure_errors(piece: Piece, source: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Fill in the sums; returns the absolute errors, with zeros where a side is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        errors = got - source
        piece.bias = float(errors.sum())
        np.abs(errors, out=errors)
        piece.signal, piece.noise = _squares(source), _squares(errors)
        if not (np.isfinite(piece.signal) and np.isfinite(piece.noise)):
            _count_nonfinite(piece, source, got)
            broken = ~np.isfinite(errors)
            errors[broken] = 0.0
            sound = np.where(broken, np.float32(0), source).astype(np.float64)
            piece.signal, piece.noise = _squares(sound), _squares(errors.astype(np.float64))
    piece.max_abs_error = float(errors.max(initial=0.0))
    return errors


def _squares(values: np.ndarray) -> float:
    return float(np.dot(values, values))


def _count_nonfinite(piece: Piece, source: np.ndarray, got: np.ndarray) -> None:
    broken = ~np.isfinite(got)
    piece.nonfinite = int(np.count_nonzero(broken))
    piece.source_nonfinite = int(np.count_nonzero(~np.isfinite(source)))
    if piece.nonfinite:
        piece.first_nonfinite = int(broken.argmax())


def _blocks(values: np.ndarray, block: int) -> np.ndarray:
    """(n, block); the last block of a tensor that does not divide is filled up with zeros."""
    missing = -values.size % block
    if missing:
        values = np.concatenate([values, np.zeros(missing, values.dtype)])
    return values.reshape(-1, block)


def _largest(blocks: np.ndarray) -> np.ndarray:
    """The maximum of each row (n, block). Halving all rows at once is ten times as fast as numpy's maximum over short rows."""
    width = blocks.shape[1]
    if width > 256 or width & (width - 1):
        return blocks.max(axis=1)
    values = blocks.reshape(-1)
    while width > 1:
        values, width = np.maximum(values[0::2], values[1::2]), width // 2
    return values


@dataclass(frozen=True)
class WorstBlock:
    """The block farthest beyond its bound: index of its first value, the error and what was allowed."""

    index: int
    error: float
    allowed: float
    anchor: bool


@dataclass
class BlockJudge:
    """Adds up a tensor's pieces in order and counts the blocks beyond the bound.

    A tensor that was rounded to nearest, but for some blocks, is held to ``bound.nearest`` in all. Blocks are judged as
    they come, except where their scales were quantized together (``bound.nested``) or are shared (``bound.tile``): what
    is allowed there depends on neighbours, so those wait for ``finish``.
    """

    bound: Bound | None
    block: int
    total: Piece = field(default_factory=lambda: Piece(0))
    worst: WorstBlock | None = None
    source_leaves: list[bytes] = field(default_factory=list)
    candidate_leaves: list[bytes] = field(default_factory=list)
    _bad: int = 0
    _blocks: int = 0
    _absmax: float = 0.0
    _missed: int = 0
    _worst_missed: WorstBlock | None = None
    _waiting: list[Piece] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        total = self.total
        if piece.differing and not total.differing:
            index, wanted, got = piece.first_difference
            total.first_difference = (total.values + index, wanted, got)
        if piece.nonfinite and not total.nonfinite:
            total.first_nonfinite = total.values + piece.first_nonfinite
        for name in ("signal", "noise", "bias", "nonfinite", "source_nonfinite", "differing"):
            setattr(total, name, getattr(total, name) + getattr(piece, name))
        total.max_abs_error = max(total.max_abs_error, piece.max_abs_error)
        self.source_leaves.append(piece.source_leaves)
        self.candidate_leaves.append(piece.candidate_leaves)
        if self.bound is not None:
            if self.bound.nested or self.bound.tile:
                self._waiting.append(piece)
            else:
                self._judge(total.values, piece, np.float32(0))
        total.values += piece.values

    def leans(self) -> float:
        """What the values are off by on average, if that is more than rounding to nearest could ever add up to; else 0.

        Errors of rounding cancel out, those of a zero point read by another convention do not. Only for types with ``nearest``, and
        not where the blocks keep to it: few distinct values may all round the same way.
        """
        mean = self.total.bias / max(self.total.values, 1)
        if self.bound is None or self._missed <= NEAREST_SHARE * self._blocks or not math.isfinite(mean):
            return 0.0
        limit = LEANING * self.bound.nearest * self._absmax / self._blocks
        return mean if abs(mean) > limit and mean**2 > LEANING**2 / 2 * self.total.noise / self.total.values else 0.0

    def finish(self) -> int:
        """Blocks beyond the bound in the whole tensor."""
        if self._waiting:
            joined = Piece(self.total.values)
            for name in ("absmax", "worst", *(["anchor"] if math.isfinite(self.bound.anchor) else [])):
                setattr(joined, name, np.concatenate([getattr(piece, name) for piece in self._waiting]))
            self._waiting = []
            shared = tile_error(joined.absmax, self.bound) if self.bound.tile else nested_scale_error(joined.absmax)
            self._judge(0, joined, shared)
        if not self._bad and self._missed <= NEAREST_SHARE * self._blocks:
            self.worst = self._worst_missed
            return self._missed
        return self._bad

    def _judge(self, first: int, piece: Piece, scale_error: np.ndarray) -> None:
        beyond = np.zeros(piece.absmax.size, bool)
        for errors, fraction, anchor in (
            (piece.anchor, self.bound.anchor, True),
            (piece.worst, self.bound.worst, False),
        ):
            here, self.worst = self._beyond(first, piece, errors, fraction, anchor, scale_error, self.worst)
            beyond |= here
        self._bad += int(np.count_nonzero(beyond))
        self._blocks += piece.absmax.size
        self._absmax += float(piece.absmax.sum(dtype=np.float64))
        here, self._worst_missed = self._beyond(
            first, piece, piece.worst, self.bound.nearest, False, scale_error, self._worst_missed
        )
        self._missed += int(np.count_nonzero(here))

    def _beyond(
        self,
        first: int,
        piece: Piece,
        errors: np.ndarray | None,
        fraction: float,
        anchor: bool,
        scale_error: np.ndarray,
        worst: WorstBlock | None,
    ) -> tuple[np.ndarray, WorstBlock | None]:
        """Which blocks are beyond a limit, and the worst of them and of those before."""
        if not np.isfinite(fraction):
            return np.zeros(piece.absmax.size, bool), worst
        allowed = (np.float32(fraction) * piece.absmax + np.float32(self.bound.floor) + scale_error) * np.float32(
            _SLACK
        )
        excess = errors - allowed
        at = int(excess.argmax())
        if excess[at] > 0 and (worst is None or excess[at] > worst.error - worst.allowed):
            worst = WorstBlock(first + at * self.block, float(errors[at]), float(allowed[at]), anchor)
        return excess > 0, worst


def nested_scale_error(absmax: np.ndarray) -> np.ndarray:
    """How far each block scale may be off after bitsandbytes' double quantization, shape (blocks,).

    Scales minus their mean over the tensor are quantized 256 at a time to the 8-bit dynamic map, relative to the
    largest of them. The CPU library finds the code through a table that may be one code off, hence a whole gap and not
    half of one.
    """
    centred = np.abs(absmax - absmax.mean(dtype=np.float64).astype(np.float32))
    largest = _blocks(centred, 256).max(axis=1)
    return np.repeat(largest * np.float32(DYNAMIC_MAP_GAP), NESTED_BLOCKSIZE)[: absmax.size]


def tile_error(absmax: np.ndarray, bound: Bound) -> np.ndarray:
    """How far values of each row may be off because rows with larger values share their scale; ``absmax`` (rows,) is theirs."""
    largest = _blocks(absmax, bound.tile).max(axis=1)
    return np.repeat(largest * np.float32(bound.tile_floor), bound.tile)[: absmax.size]
