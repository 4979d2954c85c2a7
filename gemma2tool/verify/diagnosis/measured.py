"""Mistakes whose parameters must be measured, in the tensors that no known function of the source reproduces."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from gemma2tool.model.lazy import Array
from gemma2tool.verify.diagnosis import damage, rearranged, requantized, scales, unrelated
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.diagnosis.names import fill, place
from gemma2tool.verify.diagnosis.pattern import Pattern
from gemma2tool.verify.diagnosis.row_sample import RowSample, sample_rows
from gemma2tool.verify.diagnosis.search import Case
from gemma2tool.verify.diagnosis.smoothing import causes_of_smoothing, column_factors

_UNEVEN = 0.02
"""Relative spread of the columns' factors."""
_NUMBER = re.compile(r"-?\d[\d.e+-]*")


def causes_of_patterns(case: Case, names: Sequence[str]) -> list[Cause]:
    """Causes of the differences in ``names``, one for all tensors with the same pattern and the same parameters."""
    columns: dict[str, Array] = {}
    patterns: dict[str, Pattern] = {}
    rest: list[str] = []
    for name in names:
        sample = sample_rows(case, name)
        factors = None if sample is None else column_factors(sample)
        if sample is not None and factors is not None and _differ_by_column(sample, factors):
            columns[name] = factors
        elif pattern := _pattern(case, name, sample):
            patterns[name] = pattern
        else:
            rest.append(name)
    norms = [name for name in patterns if name.endswith("layernorm.weight")]
    causes = causes_of_smoothing(case, columns, [*rest, *norms])
    smoothed = {name for cause in causes for name in cause.tensors}
    rest = [name for name in rest if name not in smoothed]
    for name in rest:
        last_resort = _last_resort(case, name)
        if last_resort is not None:
            patterns[name] = last_resort
    patterns |= unrelated.all_differ(case, [name for name in rest if name not in patterns])
    return causes + _aggregate(case, {name: pattern for name, pattern in patterns.items() if name not in smoothed})


def _differ_by_column(sample: RowSample, factors: Array) -> bool:
    """Whether the columns have different factors; a single factor would be the tensor's."""
    return bool(np.std(factors) > max(_UNEVEN, sample.limit / 2) * np.mean(factors))


def _pattern(case: Case, name: str, sample: RowSample | None) -> Pattern | None:
    """The first pattern that fits.

    Values of the source in another place are not damage. Local damage comes first where bits can be compared; in
    quantized tensors it comes last, because there it is whatever remains in a few blocks.
    """
    if sample is None:
        return damage.local_damage(case, name)
    if np.ptp(sample.candidate) == 0:
        return unrelated.unrelated(sample)
    return (
        rearranged.permuted_heads(case, sample)
        or rearranged.exchanged_rows(case, name)
        or (None if sample.quantized else damage.local_damage(case, name))
        or scales.zero_point(sample)
        or scales.factors_and_offsets(sample, case.weights.config)
        or requantized.quantized_twice(sample, case.candidate[name].stored)
        or (damage.local_damage(case, name) if sample.quantized else None)
    )


def _last_resort(case: Case, name: str) -> Pattern | None:
    """Patterns that are looked for only where smoothing does not explain the tensor either."""
    sample = sample_rows(case, name)
    if sample is None:
        return None
    return (
        rearranged.permuted_rows(case, name)
        or unrelated.unrelated(sample)
        or requantized.lossy(sample, case.candidate[name].stored)
    )


def _name_systematic(patterns: dict[str, Pattern]) -> dict[str, Pattern]:
    """Damage to the same region of several layers is not accidental, and gets another name."""
    same: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, pattern in patterns.items():
        if pattern.id == "damage.region":
            same[place(name).kind, pattern.template].append(name)
    renamed = dict(patterns)
    for names in same.values():
        for name in names if len(names) > 1 else ():
            evidence = patterns[name].evidence
            template = (
                f"in {{what}}, the same {evidence['values']} values, from {evidence['from']} to {evidence['to']}, "
                "differ from the source: a program changed them, damage does not repeat"
            )
            renamed[name] = Pattern("tensor.same-region", template, evidence)
    return renamed


def _aggregate(case: Case, patterns: dict[str, Pattern]) -> list[Cause]:
    """Patterns whose sentences differ only in numbers become one cause, with the numbers of the first."""
    ids = {pattern.id for pattern in patterns.values()}
    patterns = {
        name: pattern.otherwise if pattern.otherwise is not None and pattern.otherwise.id in ids else pattern
        for name, pattern in patterns.items()
    }
    patterns = _name_systematic(patterns)
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, pattern in patterns.items():
        groups[pattern.id, _NUMBER.sub("#", pattern.template)].append(name)
    causes = []
    for names in groups.values():
        pattern = patterns[names[0]]
        message = fill(pattern.template, names, case.weights.config)
        if len({patterns[name].template for name in names}) > 1:
            message += f" (numbers of {names[0]}; those of the others differ)"
        evidence = {**pattern.evidence, "tensors": len(names)}
        causes.append(Cause(pattern.id, message, tuple(names), evidence=evidence))
    return causes
