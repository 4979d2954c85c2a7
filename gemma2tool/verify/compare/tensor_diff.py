"""Two sides' tensors as float32 values, streamed: how many differ and by how much. Neither side is the source."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma2tool.model.lazy import LazyTensor, row_ranges, to_float32
from gemma2tool.model.progress import Advance
from gemma2tool.verify.compare.tensors import CHUNK_VALUES
from gemma2tool.verify.json_values import significant

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of both sides, as float32 values. Pairs are of A and B.

    ``differing``: number of values that are not equal (NaN equals NaN). ``by_convention``: they differ only as one
    side's format changes the other side's values. ``rms``: of both sides; ``rmse``: of their difference.
    ``first_index``, ``first_values``: the first difference; () and zeros if there is none.
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
    first_index: tuple[int, ...]
    first_values: tuple[float, float]

    @property
    def relative_rmse(self) -> float:
        """RMSE over the RMS of both sides together; 0 for equal tensors, at most 2."""
        size = math.sqrt((self.rms[0] ** 2 + self.rms[1] ** 2) / 2)
        return self.rmse / size if size else 0.0

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {"types": list(self.types), "differing": self.differing}
        if self.differing:
            content |= {
                "by_convention": self.by_convention,
                "values": self.values,
                "relative_rmse": significant(self.relative_rmse),
                "max_abs_difference": significant(self.max_abs_difference),
                "first_at": list(self.first_index),
                "first": [significant(value, 9) for value in self.first_values],
            }
        return content


def compare_values(
    a: Tensors,
    b: Tensors,
    names: Sequence[str],
    *,
    expected: tuple[Tensors, Tensors] = ({}, {}),
    threads: int = 1,
    advance: Advance | None = None,
) -> Iterator[TensorDifference]:
    """Compare the tensors ``names``, which both sides have in one shape.

    ``expected``: A's tensors as they come back from B's format, and B's as they come back from A's, for those that
    these formats change. The result does not depend on ``threads``.
    """

    def difference(total: _Piece, name: str) -> TensorDifference:
        by_convention = bool(total.differing) and (
            (name in expected[0] and _is_equal(expected[0][name], b[name]))
            or (name in expected[1] and _is_equal(expected[1][name], a[name]))
        )
        return _difference(name, a[name], b[name], total, by_convention=by_convention)

    tasks = [(name, first, last) for name in names for first, last in _ranges(a[name])]
    with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="diff") as pool:
        pieces = pool.map(lambda task: _compare(a[task[0]], b[task[0]], *task[1:]), tasks)
        current, total = "", _Piece()
        for (name, first, last), piece in zip(tasks, pieces, strict=True):
            if name != current:
                if current:
                    yield difference(total, current)
                current, total = name, _Piece()
            total = total.followed_by(piece)
            if advance is not None:
                advance((last - first) * b[name].row_size * b[name].dtype.itemsize, name)
        if current:
            yield difference(total, current)


@dataclass(frozen=True)
class _Piece:
    """A range of rows: number of values, sums of squares of A, of B and of their difference, the first difference."""

    values: int = 0
    differing: int = 0
    a_squares: float = 0.0
    b_squares: float = 0.0
    difference_squares: float = 0.0
    max_abs_difference: float = 0.0
    first_index: int = -1
    first_values: tuple[float, float] = (0.0, 0.0)

    def followed_by(self, piece: _Piece) -> _Piece:
        is_first = piece.differing and not self.differing
        return _Piece(
            self.values + piece.values,
            self.differing + piece.differing,
            self.a_squares + piece.a_squares,
            self.b_squares + piece.b_squares,
            self.difference_squares + piece.difference_squares,
            max(self.max_abs_difference, piece.max_abs_difference),
            self.values + piece.first_index if is_first else self.first_index,
            piece.first_values if is_first else self.first_values,
        )


def _ranges(tensor: LazyTensor) -> Iterable[tuple[int, int]]:
    return row_ranges(tensor.rows, max(tensor.row_size, 1), CHUNK_VALUES)


def _compare(a: LazyTensor, b: LazyTensor, first: int, last: int) -> _Piece:
    x, y = (to_float32(tensor.load_rows(first, last)).reshape(-1) for tensor in (a, b))
    a_squares = float(np.dot(x, x))
    if math.isfinite(a_squares) and np.array_equal(x, y):
        return _Piece(x.size, 0, a_squares, a_squares)
    with np.errstate(invalid="ignore", over="ignore"):
        magnitude = np.abs(x - y)
        b_squares, difference_squares = float(np.dot(y, y)), float(np.dot(magnitude, magnitude))
    if not (math.isfinite(a_squares) and math.isfinite(b_squares) and math.isfinite(difference_squares)):
        return _compare_nonfinite(x, y)
    unequal = magnitude != 0
    at = int(unequal.argmax())
    return _Piece(
        x.size,
        int(np.count_nonzero(unequal)),
        a_squares,
        b_squares,
        difference_squares,
        float(magnitude.max()),
        at,
        (float(x[at]), float(y[at])),
    )


def _compare_nonfinite(x: NDArray[np.float32], y: NDArray[np.float32]) -> _Piece:
    """For values that are not finite, or whose squares are not. NaN equals NaN, and differs infinitely from other
    values."""
    unequal = (x != y) & ~(np.isnan(x) & np.isnan(y))
    count = int(np.count_nonzero(unequal))
    with np.errstate(invalid="ignore"):
        magnitude = np.where(unequal, np.abs(x.astype(np.float64) - y), 0.0)
    magnitude = np.nan_to_num(magnitude, nan=math.inf, posinf=math.inf)
    at = int(unequal.argmax()) if count else -1
    return _Piece(
        x.size,
        count,
        _finite_square_sum(x),
        _finite_square_sum(y),
        float(np.dot(magnitude, magnitude)),
        float(magnitude.max(initial=0.0)),
        at,
        (float(x[at]), float(y[at])) if count else (0.0, 0.0),
    )


def _finite_square_sum(values: NDArray[np.float32]) -> float:
    wide = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    return float(np.dot(wide, wide))


def _difference(name: str, a: LazyTensor, b: LazyTensor, total: _Piece, *, by_convention: bool) -> TensorDifference:
    def root_mean(squares: float) -> float:
        return math.sqrt(squares / max(total.values, 1))

    index = np.unravel_index(total.first_index, a.shape or (1,)) if total.differing else ()
    return TensorDifference(
        name=name,
        shape=tuple(a.shape),
        types=(a.stored, b.stored),
        values=total.values,
        differing=total.differing,
        by_convention=by_convention,
        max_abs_difference=total.max_abs_difference,
        rms=(root_mean(total.a_squares), root_mean(total.b_squares)),
        rmse=root_mean(total.difference_squares),
        first_index=tuple(int(axis_index) for axis_index in index),
        first_values=total.first_values,
    )


def _is_equal(a: LazyTensor, b: LazyTensor) -> bool:
    return all(_compare(a, b, first, last).differing == 0 for first, last in _ranges(a))
