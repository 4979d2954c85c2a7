"""The multiple-choice knapsack of a budget, solved to a proven optimum: one option of each group, the least objective
within a limit of weight.

The linear relaxation gives a multiplier for the weight. Against it each option has a reduced cost, by which any choice
with it is worse than the relaxation; options and partial choices that cost more than the best known choice are dropped,
and what is left is a dynamic program over pairs of weight and objective (Pisinger, "A minimal algorithm for the
multiple-choice knapsack problem", 1995). A first run that keeps few pairs finds a good choice; the second proves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FEW_STATES = 2_000
MAX_STATES = 2_000_000
"""Pairs kept after each group, in the two runs. Real models leave thousands."""

MULTIPLIER_STEPS = 200


@dataclass(frozen=True)
class Group:
    """The options of a group: their objectives and their weights, both (options,)."""

    objective: Floats
    weight: Floats

    @classmethod
    def of(cls, objective: Sequence[float], weight: Sequence[float]) -> Group:
        return cls(np.asarray(objective, float), np.asarray(weight, float))


@dataclass(frozen=True)
class Solution:
    """``choices``: the option of each group. ``objective``: their sum. ``linear_bound``: that of the linear relaxation,
    below which no choice is. ``proven``: whether the choice is an optimum.
    """

    choices: tuple[int, ...]
    objective: float
    linear_bound: float
    proven: bool

    @property
    def gap(self) -> float:
        """How far the objective is above the linear bound, relative to it."""
        return self.objective / self.linear_bound - 1 if self.linear_bound else 0.0


def solve(groups: Sequence[Group], limit: float) -> Solution:
    """The choice with the least objective whose weights sum to at most ``limit``; the sum of the least weights must not
    exceed it.
    """
    multiplier = _multiplier(groups, limit)
    bound = _relaxed(groups, multiplier) - multiplier * limit
    best = _greedy(groups, multiplier, limit)
    proven = False
    for states in (FEW_STATES, MAX_STATES):
        search = _Search(groups, limit, multiplier, bound, states)
        choice = search.run(_total(groups, best))
        best, proven = (best if choice is None else choice), search.is_complete
        if proven:
            break
    return Solution(tuple(best), _total(groups, best), bound, proven)


def near_optimum(groups: Sequence[Group], limit: float) -> list[int]:
    """A choice within ``limit`` that is close to the best one, in the time of the linear relaxation alone."""
    return _greedy(groups, _multiplier(groups, limit), limit)


def _total(groups: Sequence[Group], choices: Sequence[int]) -> float:
    return float(sum(group.objective[choice] for group, choice in zip(groups, choices, strict=True)))


def _weights(groups: Sequence[Group], choices: Sequence[int]) -> float:
    return float(sum(group.weight[choice] for group, choice in zip(groups, choices, strict=True)))


def _relaxed(groups: Sequence[Group], multiplier: float) -> float:
    return float(sum((group.objective + multiplier * group.weight).min() for group in groups))


def _at(groups: Sequence[Group], multiplier: float) -> list[int]:
    """The best option of each group where weight has this price."""
    return [int((group.objective + multiplier * group.weight).argmin()) for group in groups]


def _multiplier(groups: Sequence[Group], limit: float) -> float:
    """The smallest price of weight at which the best options are within ``limit``: it makes the relaxation's bound
    the highest."""
    if _weights(groups, _at(groups, 0.0)) <= limit:
        return 0.0
    spread = max(float(np.ptp(group.objective)) for group in groups)
    steps = [np.diff(np.unique(group.weight)).min() for group in groups if len(np.unique(group.weight)) > 1]
    low, high = 0.0, spread / float(min(steps)) * 2 + 1e-300
    for _ in range(MULTIPLIER_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if _weights(groups, _at(groups, middle)) <= limit else (middle, high)
    return high


def _greedy(groups: Sequence[Group], multiplier: float, limit: float) -> list[int]:
    """The best options at the multiplier, or the lightest ones where rounding puts those beyond the limit; then
    improved one group at a time while that fits."""
    choices = _at(groups, multiplier)
    if _weights(groups, choices) > limit:
        choices = [int(group.weight.argmin()) for group in groups]
    left = limit - _weights(groups, choices)
    for index, group in enumerate(groups):
        fits = group.weight - group.weight[choices[index]] <= left
        better = int(np.where(fits, group.objective, np.inf).argmin())
        if group.objective[better] < group.objective[choices[index]]:
            left -= float(group.weight[better] - group.weight[choices[index]])
            choices[index] = better
    return choices


class _Search:
    """The dynamic program; ``is_complete`` afterwards says whether nothing was dropped for its number alone."""

    def __init__(self, groups: Sequence[Group], limit: float, multiplier: float, bound: float, max_states: int) -> None:
        self.groups, self.limit, self.multiplier, self.bound = groups, limit, multiplier, bound
        self.max_states, self.is_complete = max_states, True
        self.reduced = []
        for group in groups:
            priced = group.objective + multiplier * group.weight
            self.reduced.append(priced - priced.min())

    def run(self, known: float) -> list[int] | None:
        """A choice with a smaller objective than ``known``; None if there is none (or none was found)."""
        gap = known - self.bound
        options = [np.flatnonzero(reduced <= gap) for reduced in self.reduced]
        order = sorted(range(len(self.groups)), key=lambda index: (len(options[index]), index))
        lightest = [float(self.groups[i].weight[options[i]].min()) for i in order]
        heaviest = [float(self.groups[i].weight[options[i]].max()) for i in order]
        weights, excess = np.zeros(1), np.zeros(1)
        steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        for at, index in enumerate(order):
            group, chosen = self.groups[index], options[index]
            weights = (weights[:, None] + group.weight[chosen]).ravel()
            excess = (excess[:, None] + self.reduced[index][chosen]).ravel()
            parents = np.repeat(np.arange(len(weights) // len(chosen)), len(chosen))
            picks = np.tile(chosen, len(weights) // len(chosen))
            light, heavy = sum(lightest[at + 1 :]), sum(heaviest[at + 1 :])
            slack = np.maximum(self.limit - weights - heavy, 0) * self.multiplier
            keep = np.flatnonzero((weights + light <= self.limit) & (excess + slack < gap))
            keep = keep[self._undominated(weights[keep], excess[keep])]
            weights, excess = weights[keep], excess[keep]
            steps.append((parents[keep], picks[keep]))
            if not len(keep):
                return None
        return self._traced(order, steps, int((excess - self.multiplier * weights).argmin()))

    def _undominated(self, weights: Floats, excess: Floats) -> NDArray[np.int64]:
        """The pairs for which no other is as light and has as small an objective; at most ``max_states``, those nearest
        to the relaxation."""
        objective = excess - self.multiplier * weights
        order = np.lexsort((objective, weights))
        best_before = np.minimum.accumulate(objective[order])
        kept = order[np.concatenate([[True], objective[order][1:] < best_before[:-1]])] if len(order) else order
        if len(kept) > self.max_states:
            self.is_complete = False
            kept = kept[np.argsort(excess[kept], kind="stable")[: self.max_states]]
        return kept

    def _traced(
        self, order: list[int], steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]], state: int
    ) -> list[int]:
        choices = [0] * len(order)
        for index, (parents, picks) in zip(reversed(order), reversed(steps), strict=True):
            choices[index], state = int(picks[state]), int(parents[state])
        return choices
