"""The solver finds optima: against every choice of small problems, and against HiGHS on large ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gemma2tool.pipeline.budget.solve import Group, Solution, solve

BITS = np.array([2.06, 2.31, 2.56, 3.06, 3.44, 4.25, 4.5, 5.5, 6.56, 8.5])


def like_a_model(groups: int, seed: int) -> list[Group]:
    """Groups of a few sizes whose cost falls with the bits, by another factor and a little noise in each."""
    generator = np.random.default_rng(seed)
    sizes = generator.choice([1, 2, 4, 18, 20], groups) * 1_000_000
    return [
        Group.of(
            np.exp(generator.normal()) * size * 4.0**-BITS * np.exp(generator.normal(size=len(BITS)) * 0.1),
            size * BITS // 256 * 32,
        )
        for size in sizes
    ]


def weight(groups: list[Group], solution: Solution) -> float:
    return sum(float(group.weight[choice]) for group, choice in zip(groups, solution.choices, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_no_choice_of_a_small_problem_is_better(seed: int) -> None:
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 6))
    groups = [
        Group.of(generator.integers(0, 50, 4).astype(float), generator.integers(0, 50, 4).astype(float))
        for _ in range(count)
    ]
    least, most = (sum(f(group.weight) for group in groups) for f in (np.min, np.max))
    for limit in np.linspace(least, most + 5, 7):
        solution = solve(groups, float(limit))
        totals = [
            (sum(g.objective[c] for g, c in zip(groups, choice, strict=True)))
            for choice in itertools.product(range(4), repeat=count)
            if sum(g.weight[c] for g, c in zip(groups, choice, strict=True)) <= limit
        ]
        assert solution.objective == min(totals)
        assert solution.proven and weight(groups, solution) <= limit
        assert solution.linear_bound <= solution.objective + 1e-9


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.parametrize(("count", "bits"), [(43, 2.5), (43, 4.5), (183, 3.0), (183, 4.5)])
def test_the_optimum_of_a_model_is_that_of_highs(count: int, bits: float, capfd: pytest.CaptureFixture[str]) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    groups = like_a_model(count, seed=count)
    limit = sum(float(group.weight[-1]) for group in groups) * bits / BITS[-1]
    solution = solve(groups, limit)
    assert solution.proven and 0.999 * limit < weight(groups, solution) <= limit
    costs, weights = (np.concatenate([getattr(g, name) for g in groups]) for name in ("objective", "weight"))
    one = np.kron(np.eye(count), np.ones(len(BITS)))
    scale = costs.max()
    result = optimize.milp(
        costs / scale,
        integrality=np.ones(len(costs)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one, 1, 1),
            optimize.LinearConstraint(weights[None] / 1e6, -np.inf, limit / 1e6),
        ],
        options={"mip_rel_gap": 1e-9},
    )
    capfd.readouterr()  # HiGHS prints lines of its own
    assert solution.objective == pytest.approx(result.fun * scale, rel=1e-7)


def test_the_least_weight_within_a_cost_is_the_same_problem() -> None:
    groups = like_a_model(43, seed=1)
    limit = sum(float(group.weight[-1]) for group in groups) / 2
    best = solve(groups, limit)
    turned = [Group(group.weight, group.objective) for group in groups]
    assert solve(turned, best.objective * (1 + 1e-12)).objective == weight(groups, best)
