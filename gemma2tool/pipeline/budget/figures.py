"""A finished budget on the page of a verification: the file on the curve of KL against size, and the types by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gemma2tool.pipeline.budget.choice import BudgetOutcome
from gemma2tool.pipeline.budget.plan import PlannedBudget
from gemma2tool.verify.reports.markup import Markup, join, tag
from gemma2tool.verify.reports.quality_chart import IN_PAGE, Dot, Series, chart
from gemma2tool.verify.reports.tables import figure, table

CURVE_POINTS = 16


def budget_sections(budget: PlannedBudget, outcome: BudgetOutcome) -> list[Markup]:
    """The parts of a page about a finished file of ``budget``."""
    curve = budget.problem.curve(CURVE_POINTS)
    figures = [] if (drawing := _curve(curve, outcome)) is None else [drawing]
    return [
        tag("h2", "The budget"),
        *(tag("p", line) for line in (*outcome.choice.lines(), outcome.sentence())),
        tag("div", *figures, class_="plots") if figures else join(),
        tag("h2", "The type of each matrix"),
        tag("p", "Bars are bits per weight.", class_="soft"),
        _types(outcome.choice.rows(), bits_per_weight(budget)),
    ]


def bits_per_weight(budget: PlannedBudget) -> dict[str, float]:
    """Of each type that the choice has, over all its matrices."""
    problem, types = budget.problem, budget.choice.types
    result = {}
    for type in dict.fromkeys(types.values()):
        names = [name for name in types if types[name] == type]
        nbytes = sum(problem.sizes[name, type] for name in names)
        result[type] = 8 * nbytes / sum(problem.source.tensors[name].size for name in names)
    return result


def _curve(curve: Sequence[tuple[float, float]], outcome: BudgetOutcome) -> Markup | None:
    choice, (low, high) = outcome.choice, outcome.interval
    megabytes = choice.nbytes / 1e6
    drawing = chart(
        [
            Series("best choices, predicted", [Dot("", size / 1e6, kl, kl, kl) for size, kl in curve]),
            Series("this file, measured", [Dot("this file", megabytes, outcome.measured_kl, low, high)]),
        ],
        title="KL against size",
        frame=IN_PAGE,
    )
    if drawing is None:
        return None
    caption = (
        "What other sizes would give, from the sensitivity table. The bar is the 95 % interval of the measurement."
    )
    return figure("This file among all sizes", caption, drawing)


def _types(rows: Sequence[Sequence[str]], bits: Mapping[str, float]) -> Markup:
    header, *layers = rows
    most = max(bits.values())

    def cell(type: str) -> Markup:
        if not type:
            return join()
        width = 100 * bits[type] / most
        return join(type, tag("span", class_="gauge", style=f"width: {width:.0f}%", title=f"{bits[type]:.2f} bits"))

    names = [f"layer {name}" if name.isdigit() else name for name, *_ in layers]
    return table(header, [(name, *map(cell, types)) for name, (_, *types) in zip(names, layers, strict=True)])
