"""The same rows of a tensor on both sides, for mistakes whose parameters must be estimated: scales, offsets, grids."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gemma2tool.model.lazy import Array
from gemma2tool.verify.diagnosis.fit import BETTER_FLOAT, BETTER_QUANTIZED, is_float
from gemma2tool.verify.diagnosis.search import Case

_MAX_ROWS = 48


@dataclass(frozen=True)
class RowSample:
    """Rows of one tensor.

    ``source`` and ``candidate``: the same rows of both, float32 (n, columns); a vector is one row. ``limit``: the error
    that the candidate's type explains, as a fraction of the candidate's RMS. ``quantized``: whether the candidate
    stores a quantized type.
    """

    name: str
    source: Array
    candidate: Array
    limit: float
    quantized: bool

    @property
    def error(self) -> float:
        """The error of the source's own rows; see ``error_of``."""
        return self.error_of(self.source)

    @property
    def correlation(self) -> float:
        """Pearson's correlation of the two sides' values."""
        source, candidate = (
            rows.astype(np.float64) - rows.mean(dtype=np.float64) for rows in (self.source, self.candidate)
        )
        size = math.sqrt(float(np.mean(source**2)) * float(np.mean(candidate**2)))
        return float(np.mean(source * candidate)) / size if size else 0.0

    def error_of(self, supposed: Array) -> float:
        """RMS of (candidate - supposed) over RMS of the candidate."""
        size = rms(self.candidate)
        return rms(self.candidate - supposed) / size if size else math.inf

    def is_explained_by(self, supposed: Array) -> bool:
        """Whether what is left of the difference is rounding."""
        error = self.error_of(supposed)
        return error <= self.limit and error <= (BETTER_QUANTIZED if self.quantized else BETTER_FLOAT) * self.error


def rms(array: Array) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64)))) if array.size else 0.0


def sample_rows(case: Case, name: str) -> RowSample | None:
    """Rows spread over the tensor; None where the two sides are not comparable: different shapes, values that are not
    finite."""
    source, candidate = case.weights.get(name), case.candidate[name]
    if source is None or source.shape != candidate.shape or not candidate.size:
        return None
    if len(candidate.shape) < 2:
        sides = [tensor.load_rows_f32(0, tensor.rows).reshape(1, -1) for tensor in (source, candidate)]
    else:
        rows = np.unique(np.linspace(0, candidate.rows - 1, min(_MAX_ROWS, candidate.rows)).astype(int)).tolist()
        sides = [np.concatenate([tensor.load_rows_f32(row, row + 1) for row in rows]) for tensor in (source, candidate)]
    if not all(np.isfinite(side).all() for side in sides):
        return None
    return RowSample(name, sides[0], sides[1], case.error_limit(source, name), not is_float(candidate))
