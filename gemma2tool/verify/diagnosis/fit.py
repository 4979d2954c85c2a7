"""How well a supposed tensor reproduces a candidate's: first on a few rows, then on all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from gemma2tool.model.format_facts import Rounding
from gemma2tool.model.lazy import FLOAT_DTYPES, Array, LazyTensor, row_ranges, to_float32
from gemma2tool.verify.compare.bounds import BOUNDS
from gemma2tool.verify.compare.rules import cast

_EPSILON = {"f32": 2.0**-23, "f16": 2.0**-11, "bf16": 2.0**-8, "f64": 2.0**-52}
UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
"""Bytes of a float -> the integer type for its bits."""
CHUNK_VALUES = 1 << 20
_UNBOUNDED_LIMIT = 0.9
"""RMSE / RMS allowed for a type without a bound."""

# A mistake must explain markedly more than no mistake does. Errors of float types shrink to rounding errors; those of
# coarse quantized types shrink from sqrt(2), the error between unrelated values, to at most 0.95.
BETTER_FLOAT, BETTER_QUANTIZED = 0.25, 0.7
"""Share of the error without the mistake that may remain with it."""


@dataclass(frozen=True)
class Fit:
    """``error``: RMS of (candidate - supposed) over RMS of the candidate. ``exact``: whether all bits agree."""

    error: float
    exact: bool


@dataclass
class _Sums:
    """Sums over the values compared so far: of squared errors (``noise``) and of the candidate's squares
    (``signal``)."""

    noise: float = 0.0
    signal: float = 0.0
    values: int = 0
    exact: bool = True

    def add(self, supposed: Array, candidate: Array, stored: str) -> None:
        """Compare some rows. ``stored``: the candidate's type. NaNs of ``supposed`` are left out."""
        bits = UNSIGNED[candidate.dtype.itemsize]
        left = np.ascontiguousarray(cast(supposed, stored, candidate.dtype)).reshape(-1)
        right = np.ascontiguousarray(candidate).reshape(-1)
        claimed = ~np.isnan(to_float32(left))
        if not claimed.all():
            left, right = left[claimed], right[claimed]
        self.values += left.size
        if np.array_equal(left.view(bits), right.view(bits)):
            self.signal += _square_sum(right)
            return
        self.exact = False
        expected, actual = to_float32(left), to_float32(right)
        with np.errstate(over="ignore", invalid="ignore"):
            difference = actual.astype(np.float64) - expected
            difference[actual == expected] = 0.0  # equal infinities
        self.noise += float(np.dot(difference, difference))
        self.signal += _square_sum(right)

    def fit(self) -> Fit:
        if not self.values or math.isnan(self.noise) or math.isinf(self.noise):
            return Fit(math.inf, False)
        if self.noise == 0.0:
            return Fit(0.0, self.exact)
        return Fit(math.sqrt(self.noise / self.signal) if self.signal else math.inf, self.exact)


def _square_sum(array: Array) -> float:
    """Sum of the squares of the finite values."""
    wide = to_float32(array).astype(np.float64)
    wide = wide[np.isfinite(wide)]
    return float(np.dot(wide, wide))


def sample_ranges(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """A few short runs of rows spread over the tensor; all rows of a vector or a small matrix."""
    rows = shape[0] if shape else 1
    if len(shape) < 2 or rows <= 24:
        return [(0, rows)]
    step = rows / 5
    starts = sorted({int(step * index + step * ((7 * index + 3) % 10) / 10) for index in range(5)})
    return [(start, min(start + 3, rows)) for start in starts]


def sampled(tensor: LazyTensor) -> list[Array]:
    """The rows of ``sample_ranges``."""
    return [tensor.load_rows(first, last) for first, last in sample_ranges(tensor.shape)]


def signal_of(sample: Iterable[Array]) -> float:
    """Sum of the squares of the sample's finite values."""
    return sum(_square_sum(rows) for rows in sample)


def fit_sample(
    supposed: LazyTensor, candidate: LazyTensor, sample: Iterable[Array], max_noise: float = math.inf
) -> Fit:
    """``supposed`` against the candidate's sampled rows; stops when the squared error exceeds ``max_noise``."""
    sums = _Sums()
    for (first, last), rows in zip(sample_ranges(candidate.shape), sample, strict=True):
        sums.add(supposed.load_rows(first, last), rows, candidate.stored)
        if not sums.noise <= max_noise:
            return Fit(math.inf, False)
    return sums.fit()


def fit_whole(supposed: LazyTensor, candidate: LazyTensor, threads: int = 1) -> Fit:
    """``supposed`` against all of the candidate, a range of rows at a time."""

    def piece(bounds: tuple[int, int]) -> _Sums:
        sums = _Sums()
        sums.add(supposed.load_rows(*bounds), candidate.load_rows(*bounds), candidate.stored)
        return sums

    ranges = row_ranges(candidate.rows, max(candidate.row_size, 1), CHUNK_VALUES)
    total = _Sums()
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for sums in pool.map(piece, ranges):
            total.noise += sums.noise
            total.signal += sums.signal
            total.values += sums.values
            total.exact &= sums.exact
    return total.fit()


def is_float(tensor: LazyTensor) -> bool:
    return tensor.stored in FLOAT_DTYPES


def error_limit(source: LazyTensor, candidate: LazyTensor, rounding: Rounding = "nearest") -> float:
    """The largest error that rounding explains: a few units of a float type, the bound of a quantized type.

    ``rounding``: how the codes were chosen.
    """
    if is_float(candidate):
        return 4 * max(_EPSILON.get(candidate.stored, 0.0), _EPSILON[_float_name(source)])
    bound = BOUNDS.get(candidate.stored)
    if bound is None:
        return _UNBOUNDED_LIMIT
    return bound.for_rounding(rounding).relative_rmse


def _float_name(tensor: LazyTensor) -> str:
    return next((name for name, dtype in FLOAT_DTYPES.items() if dtype == tensor.dtype), "f32")


def explains(fit: Fit, baseline: float, limit: float, candidate: LazyTensor) -> bool:
    """Whether the fit's error is rounding. ``baseline``: the error without the mistake."""
    better = BETTER_FLOAT if is_float(candidate) else BETTER_QUANTIZED
    return fit.exact or (fit.error <= limit and fit.error <= better * baseline)
