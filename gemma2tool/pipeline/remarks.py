"""What a user should know before a plan is carried out."""

from __future__ import annotations

from collections.abc import Sequence

from gemma2tool.pipeline.plan import Plan


def plan_remarks(plans: Sequence[Plan]) -> list[str]:
    """The warnings of plans that share a source, each once."""
    remarks = [warning for plan in plans for warning in plan.source.all_warnings]
    for plan in plans:
        remarks += plan.output.warnings
        remarks += [] if plan.cost is None else plan.cost.remarks()
        if plan.output.losses:
            remarks.append(f"{plan.output.format} stores w + 1 of a norm w: {rounding(plan.output.losses)}")
    return list(dict.fromkeys(remarks))


def rounding(losses: Sequence[tuple[str, float]]) -> str:
    """How many norms lose low bits, and how much at most, in one sentence."""
    largest = max(loss for _, loss in losses)
    norms = "1 norm loses" if len(losses) == 1 else f"{len(losses)} norms lose"
    return f"{norms} up to {largest:.3g} (--json lists them)"


def number_ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
