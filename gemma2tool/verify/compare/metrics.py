"""Two models' logits at the same positions, compared in one pass over slices of the vocabulary.

With V = 256000 the logits of a hundred positions are 100 MB a side, so only a slice of them is held at a time. Sums run
online: a running maximum, and sums relative to it, in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma2tool.verify.json_values import significant

Floats = NDArray[np.float64]

_AT_ONCE = 1 << 14
"""Logits that are processed at once. The ten arrays that this needs, of 128 KiB each, stay in the caches."""


class LogitComparison:
    """Call ``add`` with every slice of the vocabulary once, in order; then ``finish``.

    ``positions``: N, all positions of all prompts. ``following``: int (N,), the token that follows each position, or -1
    where there is none. ``atol``, ``rtol``: a logit is beyond the limit if |difference| > atol + rtol * |source|.
    """

    def __init__(self, positions: int, following: NDArray[np.integer], *, atol: float = 0.0, rtol: float = 0.0) -> None:
        self.following, self.atol, self.rtol = np.asarray(following), atol, rtol
        self._sides = (_RunningSoftmax(positions), _RunningSoftmax(positions))
        self._cross = np.zeros(positions)  # sum of exp(source - max source) * (source - candidate)
        self._reverse_cross = np.zeros(positions)  # the same with the sides exchanged
        self._following_logits = np.full((2, positions), -np.inf)
        self._at_candidate_top = np.full(positions, -np.inf)  # the source's logit of the candidate's likeliest token
        self._count = 0
        self._abs_sum = 0.0
        self._max_abs = 0.0
        self._max_at = (0, 0)
        self._beyond_limit = 0
        self._nonfinite = [0, 0]

    def add(self, first: int, source: NDArray[np.float32], candidate: NDArray[np.float32]) -> None:
        """Logits of the tokens from ``first`` on, both float32 (N, slice)."""
        for side, logits in enumerate((source, candidate)):
            self._nonfinite[side] += logits.size - int(np.count_nonzero(np.isfinite(logits)))
        if any(self._nonfinite):
            self._count += source.size
            return
        step = max(_AT_ONCE // source.shape[1], 1)
        for start in range(0, source.shape[0], step):
            rows = slice(start, start + step)
            self._add(first, rows, source[rows].astype(np.float64), candidate[rows].astype(np.float64))

    def _add(self, first: int, rows: slice, source: Floats, candidate: Floats) -> None:
        difference = source - candidate
        magnitude = np.abs(difference)
        row, column = np.unravel_index(int(magnitude.argmax()), magnitude.shape)
        if magnitude[row, column] > self._max_abs:
            self._max_abs = float(magnitude[row, column])
            self._max_at = rows.start + int(row), first + int(column)
        self._abs_sum += float(magnitude.sum())
        self._beyond_limit += int(np.count_nonzero(magnitude > self.atol + self.rtol * np.abs(source)))
        self._count += source.size

        of_source, of_candidate = self._sides
        weights, rescale = of_source.add(first, rows, source)
        self._cross[rows] = self._cross[rows] * rescale + (weights * difference).sum(axis=1)
        weights, rescale = of_candidate.add(first, rows, candidate)
        self._reverse_cross[rows] = self._reverse_cross[rows] * rescale - (weights * difference).sum(axis=1)
        top = of_candidate.top[rows] - first
        changed = np.flatnonzero(top >= 0)
        self._at_candidate_top[rows.start + changed] = source[changed, top[changed]]
        following = self.following[rows] - first
        in_slice = np.flatnonzero((following >= 0) & (following < source.shape[1]))
        for side, logits in enumerate((source, candidate)):
            self._following_logits[side, rows.start + in_slice] = logits[in_slice, following[in_slice]]

    def finish(self) -> LogitMetrics:
        source, candidate = self._sides
        if any(self._nonfinite):
            return LogitMetrics.of_nonfinite(source.positions, *self._nonfinite)
        kl = np.maximum(self._cross / source.total - (source.log_sum - candidate.log_sum), 0.0)
        reverse_kl = np.maximum(self._reverse_cross / candidate.total - (candidate.log_sum - source.log_sum), 0.0)
        has_following = self.following >= 0
        log_p = self._following_logits - np.stack([source.log_sum, candidate.log_sum])
        return LogitMetrics(
            positions=source.positions,
            max_abs_difference=self._max_abs,
            max_at=self._max_at,
            mean_abs_difference=self._abs_sum / max(self._count, 1),
            beyond_limit=self._beyond_limit,
            logits=self._count,
            kl=kl,
            reverse_kl=reverse_kl,
            same_top=source.top == candidate.top,
            source_top=source.top,
            candidate_top=candidate.top,
            top_gap=source.max - self._at_candidate_top,
            log_p=log_p[:, has_following],
        )


class _RunningSoftmax:
    """Running maximum, its token, and the sum of exp(logit - maximum), per position."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.max = np.full(positions, -np.inf)
        self.total = np.zeros(positions)
        self.top = np.zeros(positions, np.int64)

    def add(self, first: int, rows: slice, logits: Floats) -> tuple[Floats, Floats]:
        """Returns exp(logits - maximum), and the factor for earlier sums."""
        at = logits.argmax(axis=1)
        largest = logits[np.arange(at.size), at]
        before = self.max[rows]
        is_higher = largest > before
        self.top[rows] = np.where(is_higher, first + at, self.top[rows])
        maximum = np.where(is_higher, largest, before)
        rescale = np.exp(before - maximum)
        weights = np.exp(logits - maximum[:, None])
        self.total[rows] = self.total[rows] * rescale + weights.sum(axis=1)
        self.max[rows] = maximum
        return weights, rescale

    @property
    def log_sum(self) -> Floats:
        return self.max + np.log(self.total)


@dataclass(frozen=True)
class LogitMetrics:
    """How two models' logits compare.

    Arrays are per position: ``kl`` (N,) = KL(source || candidate) in nats; ``reverse_kl`` = KL(candidate || source);
    ``source_top`` and ``candidate_top``, the likeliest tokens, and ``same_top``, whether they are equal; ``top_gap``,
    by how much the source's logit of its own is larger than that of the candidate's; ``log_p`` (2, M): both sides'
    log-probabilities of the token that follows, for the M positions that have one. ``max_at``: position and token of
    the largest difference. ``beyond_limit``: number of logits beyond the limit. ``nonfinite``: number of NaN or
    infinite logits of source and candidate; if there are any, nothing else is measured.
    """

    positions: int
    max_abs_difference: float
    max_at: tuple[int, int]
    mean_abs_difference: float
    beyond_limit: int
    logits: int
    kl: Floats
    reverse_kl: Floats
    same_top: NDArray[np.bool_]
    source_top: NDArray[np.int64]
    candidate_top: NDArray[np.int64]
    top_gap: Floats
    log_p: Floats
    nonfinite: tuple[int, int] = (0, 0)

    @classmethod
    def of_nonfinite(cls, positions: int, source: int, candidate: int) -> LogitMetrics:
        """For logits of which ``source`` and ``candidate`` many are not finite."""
        return cls(
            positions=positions,
            max_abs_difference=math.nan,
            max_at=(0, 0),
            mean_abs_difference=math.nan,
            beyond_limit=0,
            logits=0,
            kl=np.full(positions, np.nan),
            reverse_kl=np.full(positions, np.nan),
            same_top=np.zeros(positions, bool),
            source_top=np.full(positions, -1),
            candidate_top=np.full(positions, -1),
            top_gap=np.full(positions, np.nan),
            log_p=np.empty((2, 0)),
            nonfinite=(source, candidate),
        )

    @classmethod
    def concatenated(cls, parts: Sequence[LogitMetrics]) -> LogitMetrics:
        """The metrics of several comparisons together, positions in their order."""
        if len(parts) == 1:
            return parts[0]
        positions = sum(part.positions for part in parts)
        source_nonfinite, candidate_nonfinite = (sum(part.nonfinite[side] for part in parts) for side in (0, 1))
        if source_nonfinite or candidate_nonfinite:
            return cls.of_nonfinite(positions, source_nonfinite, candidate_nonfinite)
        worst = max(range(len(parts)), key=lambda index: parts[index].max_abs_difference)
        positions_before = sum(part.positions for part in parts[:worst])
        position, token = parts[worst].max_at
        logits = sum(part.logits for part in parts)
        return cls(
            positions=positions,
            max_abs_difference=parts[worst].max_abs_difference,
            max_at=(positions_before + position, token),
            mean_abs_difference=sum(part.mean_abs_difference * part.logits for part in parts) / logits,
            beyond_limit=sum(part.beyond_limit for part in parts),
            logits=logits,
            kl=np.concatenate([part.kl for part in parts]),
            reverse_kl=np.concatenate([part.reverse_kl for part in parts]),
            same_top=np.concatenate([part.same_top for part in parts]),
            source_top=np.concatenate([part.source_top for part in parts]),
            candidate_top=np.concatenate([part.candidate_top for part in parts]),
            top_gap=np.concatenate([part.top_gap for part in parts]),
            log_p=np.concatenate([part.log_p for part in parts], axis=1),
        )

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean())

    @property
    def mean_reverse_kl(self) -> float:
        return float(self.reverse_kl.mean())

    @property
    def top1(self) -> float:
        """Share of positions at which both have the same likeliest token."""
        return float(self.same_top.mean())

    def near_ties(self, gap: float) -> int:
        """Positions whose likeliest tokens differ although the source finds the candidate's less likely by at most
        ``gap``, a difference of logits."""
        return int(np.count_nonzero(~self.same_top & (self.top_gap <= gap)))

    def kl_percentile(self, percent: float) -> float:
        return float(np.percentile(self.kl, percent))

    def distribution(self) -> dict[str, float]:
        """KL and top-1 agreement by metric name; the 99.9th percentile only if there are at least 10,000 positions."""
        statistics = {
            "kl_mean": self.mean_kl,
            "kl_median": self.kl_percentile(50),
            "kl_p99": self.kl_percentile(99),
            "kl_max": float(self.kl.max()),
            "top1_agreement": self.top1,
        }
        if self.positions >= 10_000:
            statistics["kl_p99_9"] = self.kl_percentile(99.9)
        return {name: significant(value) for name, value in statistics.items()} | {"positions": self.positions}

    def prediction(self) -> dict[str, float]:
        """Perplexities over the tokens that follow, with standard errors, and the change of those tokens' probability.

        Meaningful only for running text. Empty if no position has a following token.
        """
        source, candidate = -self.log_p
        count = source.size
        if not count:
            return {}
        change = np.exp(self.log_p[1]) - np.exp(self.log_p[0])
        statistics = {
            "perplexity_source": math.exp(source.mean()),
            "perplexity_source_se": math.exp(source.mean()) * _standard_error(source),
            "perplexity_candidate": math.exp(candidate.mean()),
            "perplexity_candidate_se": math.exp(candidate.mean()) * _standard_error(candidate),
            "perplexity_ratio": math.exp((candidate - source).mean()),
            "perplexity_ratio_se": math.exp((candidate - source).mean()) * _standard_error(candidate - source),
            "chosen_probability_change_mean": float(change.mean()),
            "chosen_probability_change_rms": math.sqrt(float((change**2).mean())),
        }
        return {name: significant(value) for name, value in statistics.items()} | {"predicted_tokens": count}


def _standard_error(values: Floats) -> float:
    """Of the mean; times exp(mean), that of exp(mean), to first order."""
    return float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else 0.0
