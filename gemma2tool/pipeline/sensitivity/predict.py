"""From a sensitivity table to predictions: of one matrix in one type, and of a whole choice.

A matrix's KL is the measured one where there is one, otherwise the second order times the ratio of measurement to
second order over the measured matrices of its kind. A choice's KL is the sum, times how much more, or less, than the
sum the layers cost together where whole models were measured.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from gemma2tool.pipeline.sensitivity.table import Entry, SensitivityTable, Sum

MAX_RATIO = 4.0
"""The largest correction by a ratio: beyond it, so little was measured that it is noise."""


@dataclass(frozen=True)
class Agreement:
    """Second order beside measurement, summed over the ``tensors`` that were measured in a type. ``spread``: the
    standard deviation of the logarithm of their ratio.
    """

    type: str
    tensors: int
    second_order: float
    measured: float
    spread: float


def agreements(table: SensitivityTable) -> tuple[Agreement, ...]:
    """For each type with measurements."""
    rows = []
    for type in table.types:
        entries = [entries[type] for entries in table.entries.values() if type in entries]
        both = [(e.second_order.mean, e.measured.mean) for e in entries if e.second_order.tokens and e.measured.tokens]
        if both:
            logs = [math.log(a / b) for a, b in both if a > 0 and b > 0]
            middle = sum(logs) / max(len(logs), 1)
            spread = math.sqrt(sum((x - middle) ** 2 for x in logs) / max(len(logs), 1))
            rows.append(Agreement(type, len(both), sum(a for a, _ in both), sum(b for _, b in both), spread))
    return tuple(rows)


@dataclass(frozen=True)
class Predictor:
    """Predictions from ``table``."""

    table: SensitivityTable

    @cached_property
    def costs(self) -> Mapping[str, Mapping[str, float]]:
        """The KL of each matrix alone, by canonical name and type."""
        return {
            name: {type: self._cost(name, entry) for type, entry in entries.items()}
            for name, entries in self.table.entries.items()
        }

    def total(self, sum_of_costs: float) -> float:
        """The KL of a whole choice from the sum of its costs."""
        return sum_of_costs * self._interaction(sum_of_costs)

    def sum_for(self, total: float) -> float:
        """The sum of costs whose ``total`` is this; the inverse of ``total``."""
        low, high = total / MAX_RATIO, total * MAX_RATIO
        for _ in range(100):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.total(middle) < total else (low, middle)
        return low

    def _cost(self, name: str, entry: Entry) -> float:
        if entry.measured.tokens:
            return entry.measured.mean
        return entry.second_order.mean * self._by_kind.get(_kind(name), 1.0)

    @cached_property
    def _by_kind(self) -> Mapping[str, float]:
        """Measurement over second order, by kind of matrix."""
        sums: dict[str, Entry] = defaultdict(Entry)
        for name, entries in self.table.entries.items():
            for entry in entries.values():
                if entry.measured.tokens and entry.second_order.tokens:
                    sums[_kind(name)] += entry
        return {kind: _ratio(entry.measured, entry.second_order) for kind, entry in sums.items()}

    @cached_property
    def _wholes(self) -> list[tuple[float, float]]:
        """(logarithm of the sum of the layers' costs, ratio of the measured whole to it), ascending."""
        points = []
        for type, whole in self.table.whole.items():
            layers = [costs for name, costs in self.costs.items() if ".layers." in name]
            if all(type in costs for costs in layers) and whole.tokens and whole.kl > 0:
                alone = sum(costs[type] for costs in layers)
                if alone > 0:
                    points.append((math.log(alone), min(max(whole.mean / alone, 1 / MAX_RATIO), MAX_RATIO)))
        return sorted(points)

    def _interaction(self, sum_of_costs: float) -> float:
        """Interpolated between the wholes by the logarithm of the sum; constant beyond them."""
        points = self._wholes
        if not points or sum_of_costs <= 0:
            return 1.0
        x = math.log(sum_of_costs)
        if x <= points[0][0]:
            return points[0][1]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if x <= x1:
                return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        return points[-1][1]


def _kind(name: str) -> str:
    """q_proj, down_proj, ...; the whole name outside the layers."""
    return name.split(".")[-2] if ".layers." in name else name


def _ratio(measured: Sum, second_order: Sum) -> float:
    if not second_order.kl or not measured.kl:
        return 1.0
    return min(max(measured.mean / second_order.mean, 1 / MAX_RATIO), MAX_RATIO)
