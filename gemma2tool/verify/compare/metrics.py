"""Two models' logits at the same positions, compared in one pass over slices of the vocabulary.

With V = 256000 the logits of a hundred positions are 100 MB a side; nothing here holds more than a slice of them. Sums
run online: a running maximum and the sums relative to it, in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma2tool.verify.json_values import significant

_AT_ONCE = 1 << 18  # logits whose arithmetic is done at once: 2 MiB in double precision


class LogitComparison:
    """Feed with ``add`` every slice of the vocabulary once, in order; then ``finish``.

    ``positions``: N, all positions of all prompts. ``following``: int (N,), the token that follows each position, or -1
    where none does. ``atol``, ``rtol``: a logit counts as beyond the limit when |difference| > atol + rtol * |source|.
    """

    def __init__(self, positions: int, following: np.ndarray, *, atol: float = 0.0, rtol: float = 0.0) -> None:
        self.following, self.atol, self.rtol = np.asarray(following), atol, rtol
        self._sides = (_Side(positions), _Side(positions))
        self._cross = np.zeros(positions)  # sum of exp(s - max s) * (s - c)
        self._back = np.zeros(positions)  # sum of exp(c - max c) * (c - s)
        self._chosen = np.full((2, positions), -np.inf)
        self._count = 0
        self._sum_abs = 0.0
        self._max_abs = 0.0
        self._max_at = (0, 0)
        self._beyond = 0
        self._nonfinite = [0, 0]

    def add(self, first: int, source: np.ndarray, candidate: np.ndarray) -> None:
        """Logits of tokens ``first`` onwards, both float32 (N, slice)."""
        for side, logits in enumerate((source, candidate)):
            broken = logits.size - int(np.count_nonzero(np.isfinite(logits)))
            self._nonfinite[side] += broken
        if any(self._nonfinite):
            self._count += source.size
            return
        step = max(_AT_ONCE // source.shape[1], 1)
        for start in range(0, source.shape[0], step):
            rows = slice(start, start + step)
            self._add(first, rows, source[rows].astype(np.float64), candidate[rows].astype(np.float64))

    def _add(self, first: int, rows: slice, s: np.ndarray, c: np.ndarray) -> None:
        difference = s - c
        magnitude = np.abs(difference)
        at = np.unravel_index(int(magnitude.argmax()), magnitude.shape)
        if magnitude[at] > self._max_abs:
            self._max_abs, self._max_at = float(magnitude[at]), (rows.start + int(at[0]), first + int(at[1]))
        self._sum_abs += float(magnitude.sum())
        self._beyond += int(np.count_nonzero(magnitude > self.atol + self.rtol * np.abs(s)))
        self._count += s.size

        ours, theirs = self._sides
        weights, rescale = ours.add(first, rows, s)
        self._cross[rows] = self._cross[rows] * rescale + (weights * difference).sum(axis=1)
        weights, rescale = theirs.add(first, rows, c)
        self._back[rows] = self._back[rows] * rescale - (weights * difference).sum(axis=1)
        following = self.following[rows] - first
        here = np.flatnonzero((following >= 0) & (following < s.shape[1]))
        for side, logits in enumerate((s, c)):
            self._chosen[side, rows.start + here] = logits[here, following[here]]

    def finish(self) -> LogitMetrics:
        ours, theirs = self._sides
        if any(self._nonfinite):
            return LogitMetrics.broken(ours.positions, *self._nonfinite)
        kl = np.maximum(self._cross / ours.total - (ours.log_sum - theirs.log_sum), 0.0)
        back = np.maximum(self._back / theirs.total - (theirs.log_sum - ours.log_sum), 0.0)
        known = self.following >= 0
        log_p = np.stack([self._chosen[0] - ours.log_sum, self._chosen[1] - theirs.log_sum])[:, known]
        return LogitMetrics(
            positions=ours.positions,
            max_abs_difference=self._max_abs,
            max_at=self._max_at,
            mean_abs_difference=self._sum_abs / max(self._count, 1),
            beyond=self._beyond,
            logits=self._count,
            kl=kl,
            kl_back=back,
            same_top=ours.top == theirs.top,
            source_top=ours.top,
            candidate_top=theirs.top,
            log_p=log_p,
        )


class _Side:
    """Running maximum, its token, and the sum of exp(logit - maximum), per position."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.max = np.full(positions, -np.inf)
        self.total = np.zeros(positions)
        self.top = np.zeros(positions, np.int64)

    def add(self, first: int, rows: slice, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns exp(logits - maximum) and what earlier sums are to be multiplied by."""
        at = logits.argmax(axis=1)
        largest = logits[np.arange(at.size), at]
        before = self.max[rows]
        higher = largest > before
        self.top[rows] = np.where(higher, first + at, self.top[rows])
        maximum = np.where(higher, largest, before)
        rescale = np.exp(before - maximum)
        weights = np.exp(logits - maximum[:, None])
        self.total[rows] = self.total[rows] * rescale + weights.sum(axis=1)
        self.max[rows] = maximum
        return weights, rescale

    @property
    def log_sum(self) -> np.ndarray:
        return self.max + np.log(self.total)


@dataclass(frozen=True)
class LogitMetrics:
    """What two models' logits say of each other.

    Arrays are per position: ``kl`` (N,) = KL(source || candidate) in nats, ``kl_back`` the other way round, ``same_top``, ``source_top`` and
    ``candidate_top`` (N,), and ``log_p`` (2, M): both sides' log-probabilities of the token that follows, for the M
    positions where one does. ``beyond``: logits farther apart than the limit. ``nonfinite``: NaN or infinite logits of
    source and candidate; all else is then empty.
    """

    positions: int
    max_abs_difference: float
    max_at: tuple[int, int]
    mean_abs_difference: float
    beyond: int
    logits: int
    kl: np.ndarray
    kl_back: np.ndarray
    same_top: np.ndarray
    source_top: np.ndarray
    candidate_top: np.ndarray
    log_p: np.ndarray
    nonfinite: tuple[int, int] = (0, 0)

    @classmethod
    def broken(cls, positions: int, source: int, candidate: int) -> LogitMetrics:
        nothing, none = np.full(positions, np.nan), np.zeros(positions, bool)
        tops = np.full(positions, -1)
        lost = math.nan
        return cls(
            positions,
            lost,
            (0, 0),
            lost,
            0,
            0,
            nothing,
            nothing,
            none,
            tops,
            tops,
            np.empty((2, 0)),
            (source, candidate),
        )

    @classmethod
    def joined(cls, parts: Sequence[LogitMetrics]) -> LogitMetrics:
        """What several comparisons say together, positions in their order."""
        if len(parts) == 1:
            return parts[0]
        positions = sum(part.positions for part in parts)
        nonfinite = tuple(sum(part.nonfinite[side] for part in parts) for side in (0, 1))
        if any(nonfinite):
            return cls.broken(positions, *nonfinite)
        worst = max(range(len(parts)), key=lambda i: parts[i].max_abs_difference)
        before = sum(part.positions for part in parts[:worst])
        logits = sum(part.logits for part in parts)
        arrays = {
            name: np.concatenate([getattr(part, name) for part in parts], axis=-1)
            for name in ("kl", "kl_back", "same_top", "source_top", "candidate_top", "log_p")
        }
        return cls(
            positions=positions,
            max_abs_difference=parts[worst].max_abs_difference,
            max_at=(before + parts[worst].max_at[0], parts[worst].max_at[1]),
            mean_abs_difference=sum(part.mean_abs_difference * part.logits for part in parts) / logits,
            beyond=sum(part.beyond for part in parts),
            logits=logits,
            **arrays,
        )

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean())

    @property
    def mean_kl_back(self) -> float:
        return float(self.kl_back.mean())

    @property
    def top1(self) -> float:
        """Share of positions whose likeliest token is the same."""
        return float(self.same_top.mean())

    def kl_percentile(self, percent: float) -> float:
        return float(np.percentile(self.kl, percent))

    def distribution(self) -> dict[str, Any]:
        """KL and top-1 agreement; the 99.9th percentile only where there are 10,000 positions to speak of one."""
        found = {
            "kl_mean": self.mean_kl,
            "kl_median": self.kl_percentile(50),
            "kl_p99": self.kl_percentile(99),
            "kl_max": float(self.kl.max()),
            "top1_agreement": self.top1,
        }
        if self.positions >= 10_000:
            found["kl_p99_9"] = self.kl_percentile(99.9)
        return {name: significant(value) for name, value in found.items()} | {"positions": self.positions}

    def prediction(self) -> dict[str, Any]:
        """Perplexities over the tokens that follow, their ratio with its standard error, and the change of those
        tokens' probability. Means something only where the prompt is text."""
        ours, theirs = -self.log_p
        count = ours.size
        if not count:
            return {}
        change = np.exp(self.log_p[1]) - np.exp(self.log_p[0])
        found = {
            "perplexity_source": math.exp(ours.mean()),
            "perplexity_source_se": math.exp(ours.mean()) * _standard_error(ours),
            "perplexity_candidate": math.exp(theirs.mean()),
            "perplexity_candidate_se": math.exp(theirs.mean()) * _standard_error(theirs),
            "perplexity_ratio": math.exp((theirs - ours).mean()),
            "perplexity_ratio_se": math.exp((theirs - ours).mean()) * _standard_error(theirs - ours),
            "chosen_probability_change_mean": float(change.mean()),
            "chosen_probability_change_rms": math.sqrt(float((change**2).mean())),
        }
        return {name: significant(value) for name, value in found.items()} | {"predicted_tokens": count}


def _standard_error(values: np.ndarray) -> float:
    """Of the mean; of exp(mean) when multiplied by it (first order)."""
    return float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else 0.0
