"""What a user should know before a plan is carried out."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gemma2tool.pipeline.plan import Plan


def plan_remarks(plans: Sequence[Plan]) -> list[str]:
    """The warnings of plans that share a source, each once."""
    remarks = [warning for plan in plans for warning in plan.source.all_warnings]
    for plan in plans:
        remarks += plan.output.warnings
        remarks += [] if plan.cost is None else plan.cost.remarks()
        remarks += [
            f"{plan.output.format} stores w + 1 of a norm w: {line}" for line in rounding_lines(plan.output.losses)
        ]
    return list(dict.fromkeys(remarks))


def rounding_lines(losses: Sequence[tuple[str, float]]) -> list[str]:
    """One line for each kind of tensor that loses low bits: ``model.layers.{0-3,7}.input_layernorm.weight loses up to
    3e-08``.
    """
    layers: dict[str, list[int]] = {}
    largest: dict[str, float] = {}
    for name, loss in losses:
        pattern = re.sub(r"(?<=\.layers\.)\d+", "{}", name)
        layers.setdefault(pattern, []).extend(int(number) for number in re.findall(r"\.layers\.(\d+)\.", name))
        largest[pattern] = max(loss, largest.get(pattern, 0.0))
    return [
        f"{pattern.replace('{}', '{' + number_ranges(sorted(layers[pattern])) + '}')} loses up to {loss:.3g}"
        for pattern, loss in largest.items()
    ]


def number_ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
