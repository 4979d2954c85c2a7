"""A portion of a tensor's rows on both sides, for mistakes whose numbers must be estimated: scales, offsets, grids."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gemma2tool.verify.diagnosis.fit import is_float
from gemma2tool.verify.diagnosis.search import Case

_ROWS = 48


@dataclass(frozen=True)
class Portion:
    """``source`` and ``candidate``: the same rows of both, float32 (n, columns); a vector is one row. ``limit``: the error, as a
    fraction of the candidate's RMS, that its type explains; ``error``: that of the source's own tensor."""

    name: str
    source: np.ndarray
    candidate: np.ndarray
    limit: float
    quantized: bool

    @property
    def error(self) -> float:
        return self.off(self.source)

    @property
    def correlation(self) -> float:
        """Pearson's, of the two sides' values."""
        ours, theirs = (each.astype(np.float64) - each.mean(dtype=np.float64) for each in (self.source, self.candidate))
        size = math.sqrt(float(np.mean(ours**2)) * float(np.mean(theirs**2)))
        return float(np.mean(ours * theirs)) / size if size else 0.0

    def off(self, supposed: np.ndarray) -> float:
        """RMS of (candidate - supposed) over the RMS of the candidate."""
        size = rms(self.candidate)
        return rms(self.candidate - supposed) / size if size else float("inf")

    def explains(self, supposed: np.ndarray) -> bool:
        error = self.off(supposed)
        return error <= self.limit and error <= (0.7 if self.quantized else 0.25) * self.error


def rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64)))) if array.size else 0.0


def portion(case: Case, name: str) -> Portion | None:
    """Rows from all over the tensor; None where the two cannot be compared: other shapes, values that are not finite."""
    source, candidate = case.weights.get(name), case.candidate[name]
    if source is None or source.shape != candidate.shape or not candidate.size:
        return None
    if len(candidate.shape) < 2:
        ours, theirs = (each.load_rows_f32(0, each.rows).reshape(1, -1) for each in (source, candidate))
    else:
        rows = np.unique(np.linspace(0, candidate.rows - 1, min(_ROWS, candidate.rows)).astype(int))
        ours, theirs = (
            np.concatenate([each.load_rows_f32(row, row + 1) for row in rows.tolist()]) for each in (source, candidate)
        )
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return None
    limit = case.limit(source, name)
    return Portion(name, ours, theirs, limit, not is_float(candidate))
