"""How well a supposed tensor reproduces a candidate's: on a few rows first, then on all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from gemma2tool.model.lazy import FLOAT_DTYPES, LazyTensor, row_ranges, to_float32
from gemma2tool.verify.compare.bounds import BOUNDS
from gemma2tool.verify.compare.tensors import cast

_UNITS = {"f32": 2.0**-23, "f16": 2.0**-11, "bf16": 2.0**-8, "f64": 2.0**-52}
_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_CHUNK_VALUES = 1 << 20
_UNKNOWN_TYPE = 0.9  # RMSE / RMS allowed to a type without a bound

# A mistake must explain markedly more than no mistake does: errors of float types shrink to rounding, those of coarse quantized
# types from sqrt(2), which unrelated values have, to at most 0.95.
_BETTER_FLOAT, _BETTER_QUANTIZED = 0.25, 0.7


@dataclass(frozen=True)
class Fit:
    """``error``: RMS of (candidate - supposed) over the RMS of the candidate; ``exact``: no bit differs; ``values``: compared."""

    error: float
    exact: bool
    values: int


@dataclass
class _Sums:
    noise: float = 0.0
    signal: float = 0.0
    values: int = 0
    exact: bool = True

    def add(self, supposed: np.ndarray, got: np.ndarray, stored: str) -> None:
        made = cast(supposed, stored, got.dtype)
        bits = _UNSIGNED[got.dtype.itemsize]
        left = np.ascontiguousarray(made).reshape(-1)
        right = np.ascontiguousarray(got).reshape(-1)
        claimed = ~np.isnan(to_float32(left))
        if not claimed.all():
            left, right = left[claimed], right[claimed]
        self.values += left.size
        if np.array_equal(left.view(bits), right.view(bits)):
            self.signal += _square(right)
            return
        self.exact = False
        wanted, found = to_float32(left), to_float32(right)
        with np.errstate(over="ignore", invalid="ignore"):
            apart = found.astype(np.float64) - wanted
            apart[found == wanted] = 0.0  # infinities that agree
        self.noise += float(np.dot(apart, apart))
        self.signal += _square(right)

    def fit(self) -> Fit:
        if not self.values or math.isnan(self.noise) or math.isinf(self.noise):
            return Fit(math.inf, False, self.values)
        if self.noise == 0.0:
            return Fit(0.0, self.exact, self.values)
        return Fit(math.sqrt(self.noise / self.signal) if self.signal else math.inf, self.exact, self.values)


def _square(array: np.ndarray) -> float:
    wide = to_float32(array).astype(np.float64)
    wide = wide[np.isfinite(wide)]
    return float(np.dot(wide, wide))


def sample_ranges(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """A few short runs of rows all over the tensor; all of a vector or a small matrix."""
    rows = shape[0] if shape else 1
    if len(shape) < 2 or rows <= 24:
        return [(0, rows)]
    step = rows / 5
    starts = sorted({int(step * index + step * ((7 * index + 3) % 10) / 10) for index in range(5)})
    return [(start, min(start + 3, rows)) for start in starts]


def sampled(tensor: LazyTensor, shape: tuple[int, ...]) -> list[np.ndarray]:
    """The sample's rows, of a tensor of that shape."""
    return [tensor.load_rows(first, last) for first, last in sample_ranges(shape)]


def signal_of(rows: Iterable[np.ndarray]) -> float:
    """Sum of the squares of finite values."""
    return sum(_square(each) for each in rows)


def fit_sample(supposed: LazyTensor, candidate: LazyTensor, rows: Iterable[np.ndarray], most: float = math.inf) -> Fit:
    """``supposed`` against the candidate's sampled ``rows``; stops where the squared error adds up to more than ``most``."""
    sums = _Sums()
    for (first, last), got in zip(sample_ranges(candidate.shape), rows, strict=True):
        sums.add(supposed.load_rows(first, last), got, candidate.stored)
        if not sums.noise <= most:
            return Fit(math.inf, False, sums.values)
    return sums.fit()


def fit_whole(supposed: LazyTensor, candidate: LazyTensor, threads: int = 1) -> Fit:
    """``supposed`` against all of the candidate, a range of rows at a time."""

    def piece(bounds: tuple[int, int]) -> _Sums:
        sums = _Sums()
        sums.add(supposed.load_rows(*bounds), candidate.load_rows(*bounds), candidate.stored)
        return sums

    ranges = row_ranges(candidate.rows, max(candidate.row_size, 1), _CHUNK_VALUES)
    total = _Sums()
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for each in pool.map(piece, ranges):
            total.noise += each.noise
            total.signal += each.signal
            total.values += each.values
            total.exact &= each.exact
    return total.fit()


def is_float(tensor: LazyTensor) -> bool:
    return tensor.stored in FLOAT_DTYPES


def allowed(source: LazyTensor, candidate: LazyTensor, weighted: bool = False) -> float:
    """The largest error that rounding explains: of float types a few units, of quantized types their bound."""
    if is_float(candidate):
        return 4 * max(_UNITS.get(candidate.stored, 0.0), _UNITS[_name(source)])
    bound = BOUNDS.get(candidate.stored)
    if bound is None:
        return _UNKNOWN_TYPE
    return (bound.steered() if weighted else bound).relative_rmse


def _name(tensor: LazyTensor) -> str:
    return next((name for name, dtype in FLOAT_DTYPES.items() if dtype == tensor.dtype), "f32")


def explains(fit: Fit, unexplained: float, limit: float, candidate: LazyTensor) -> bool:
    """Whether an error is rounding where without the mistake it was ``unexplained``."""
    better = _BETTER_FLOAT if is_float(candidate) else _BETTER_QUANTIZED
    return fit.exact or (fit.error <= limit and fit.error <= better * unexplained)
