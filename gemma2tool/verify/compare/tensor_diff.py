"""Two sides' tensors as float32 values, streamed: how many are not equal, and how far apart they are, with neither side the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma2tool.model.lazy import LazyTensor, row_ranges, to_float32
from gemma2tool.model.progress import Advance
from gemma2tool.verify.json_values import significant

Tensors = Mapping[str, LazyTensor]
_CHUNK_VALUES = 128 * 1024  # compared at a time by one thread; see ``tensors``


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of both sides, as float32 values.

    ``differing``: values that are not equal (NaN equals NaN). ``by_convention``: they differ by no more than one side's format changes
    of the other side's values. ``rms``: of A and of B; ``rmse``: of their difference. ``at``, ``values_there``: the first difference.
    """

    name: str
    shape: tuple[int, ...]
    types: tuple[str, str]
    values: int
    differing: int
    by_convention: bool
    max_abs_difference: float
    rms: tuple[float, float]
    rmse: float
    at: tuple[int, ...]
    values_there: tuple[float, float]

    @property
    def relative(self) -> float:
        """The difference's RMS over that of both sides together; 0 for equal tensors, at most 2."""
        size = math.sqrt((self.rms[0] ** 2 + self.rms[1] ** 2) / 2)
        return self.rmse / size if size else 0.0

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"types": list(self.types), "differing": self.differing}
        if self.differing:
            found |= {
                "by_convention": self.by_convention,
                "values": self.values,
                "relative_rmse": significant(self.relative),
                "max_abs_difference": significant(self.max_abs_difference),
                "first_at": list(self.at),
                "first": [significant(each, 9) for each in self.values_there],
            }
        return found


def compare_values(
    a: Tensors,
    b: Tensors,
    names: Sequence[str],
    *,
    kept: tuple[Tensors, Tensors] = ({}, {}),
    threads: int = 1,
    advance: Advance | None = None,
) -> Iterator[TensorDifference]:
    """Each of ``names``, which both sides hold in one shape. ``kept``: A's tensors as B's format would give them back, and B's as A's
    would. The result does not depend on ``threads``."""

    def convention(name: str) -> bool:
        ours, theirs = a[name], b[name]
        return (name in kept[0] and _equal(kept[0][name], theirs)) or (name in kept[1] and _equal(kept[1][name], ours))

    tasks = [(name, first, last) for name in names for first, last in _ranges(a[name])]
    with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="diff") as pool:
        pieces = pool.map(lambda task: _piece(a[task[0]], b[task[0]], *task[1:]), tasks)
        current: _Sum | None = None
        for (name, first, last), piece in zip(tasks, pieces, strict=True):
            if current is None or current.name != name:
                if current is not None:
                    yield current.told(a[current.name], b[current.name], convention)
                current = _Sum(name)
            current.add(piece)
            if advance is not None:
                advance((last - first) * b[name].row_size * b[name].dtype.itemsize, name)
        if current is not None:
            yield current.told(a[current.name], b[current.name], convention)


def _ranges(tensor: LazyTensor) -> Iterable[tuple[int, int]]:
    return row_ranges(tensor.rows, max(tensor.row_size, 1), _CHUNK_VALUES)


_Piece = tuple[int, int, float, float, float, float, int, tuple[float, float]]


def _piece(a: LazyTensor, b: LazyTensor, first: int, last: int) -> _Piece:
    """Values, differing ones, squares of a, of b and of their difference, the largest difference, where the first is and both values."""
    x, y = (to_float32(each.load_rows(first, last)).reshape(-1) for each in (a, b))
    ours = float(np.dot(x, x))
    if math.isfinite(ours) and np.array_equal(x, y):
        return x.size, 0, ours, ours, 0.0, 0.0, -1, (0.0, 0.0)
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(x - y)
        theirs, between = float(np.dot(y, y)), float(np.dot(apart, apart))
    if not (math.isfinite(ours) and math.isfinite(theirs) and math.isfinite(between)):
        return _odd_piece(x, y)
    unequal = apart != 0
    at = int(unequal.argmax())
    return (
        x.size,
        int(np.count_nonzero(unequal)),
        ours,
        theirs,
        between,
        float(apart.max()),
        at,
        (float(x[at]), float(y[at])),
    )


def _odd_piece(x: np.ndarray, y: np.ndarray) -> _Piece:
    """The same where values, or their squares, are not finite in float32: NaN equals NaN, and is infinitely far from all else."""
    unequal = (x != y) & ~(np.isnan(x) & np.isnan(y))
    count = int(np.count_nonzero(unequal))
    with np.errstate(invalid="ignore"):
        apart = np.where(unequal, np.abs(x.astype(np.float64) - y), 0.0)
    apart = np.nan_to_num(apart, nan=math.inf, posinf=math.inf)
    at = int(unequal.argmax()) if count else -1
    there = (float(x[at]), float(y[at])) if count else (0.0, 0.0)
    return (
        x.size,
        count,
        _squares(x),
        _squares(y),
        float(np.dot(apart, apart)),
        float(apart.max(initial=0.0)),
        at,
        there,
    )


def _squares(values: np.ndarray) -> float:
    """Of the finite ones."""
    wide = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    return float(np.dot(wide, wide))


@dataclass
class _Sum:
    """A tensor's pieces, added up in order."""

    name: str
    values: int = 0
    differing: int = 0
    squares: tuple[float, float, float] = (0.0, 0.0, 0.0)
    largest: float = 0.0
    at: int = -1
    there: tuple[float, float] = (0.0, 0.0)

    def add(self, piece: _Piece) -> None:
        values, differing, ours, theirs, apart, largest, at, there = piece
        if differing and not self.differing:
            self.at, self.there = self.values + at, there
        self.values += values
        self.differing += differing
        self.squares = (self.squares[0] + ours, self.squares[1] + theirs, self.squares[2] + apart)
        self.largest = max(self.largest, largest)

    def told(self, a: LazyTensor, b: LazyTensor, convention: Callable[[str], bool]) -> TensorDifference:
        ours, theirs, apart = (math.sqrt(each / max(self.values, 1)) for each in self.squares)
        at = tuple(int(each) for each in np.unravel_index(self.at, a.shape or (1,))) if self.differing else ()
        return TensorDifference(
            name=self.name,
            shape=tuple(a.shape),
            types=(a.stored, b.stored),
            values=self.values,
            differing=self.differing,
            by_convention=bool(self.differing) and convention(self.name),
            max_abs_difference=self.largest,
            rms=(ours, theirs),
            rmse=apart,
            at=at,
            values_there=self.there,
        )


def _equal(a: LazyTensor, b: LazyTensor) -> bool:
    return all(_piece(a, b, first, last)[1] == 0 for first, last in _ranges(a))
