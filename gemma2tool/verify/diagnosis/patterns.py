"""Mistakes that must be measured before they can be named, in the tensors that no known function of the source reproduces."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from gemma2tool.verify.diagnosis import damage, losses, rearranged, scales
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.diagnosis.names import described, place
from gemma2tool.verify.diagnosis.row_sample import Portion, portion
from gemma2tool.verify.diagnosis.search import Case
from gemma2tool.verify.diagnosis.smoothing import causes_of_smoothing, column_factors

_UNEVEN = 0.02  # relative spread of the columns' factors
_NUMBER = re.compile(r"-?\d[\d.e+-]*")


def causes_of_patterns(case: Case, names: Sequence[str]) -> list[Cause]:
    """Causes of what differs in ``names``, one for all tensors with the same pattern and the same numbers."""
    columns: dict[str, np.ndarray] = {}
    found: dict[str, scales.Pattern] = {}
    left: list[str] = []
    for name in names:
        here = portion(case, name)
        scaled = None if here is None else column_factors(here)
        if scaled is not None and _by_column(here, scaled):
            columns[name] = scaled
        elif pattern := _pattern(case, name, here):
            found[name] = pattern
        else:
            left.append(name)
    causes = causes_of_smoothing(case, columns, [*left, *(name for name in found if name.endswith("layernorm.weight"))])
    told = {name for cause in causes for name in cause.tensors}
    for name in left:
        here = None if name in told else portion(case, name)
        pattern = here and (
            losses.permuted(case, name) or losses.unrelated(here) or losses.lossy(here, case.candidate[name].stored)
        )
        if pattern is not None:
            found[name] = pattern
    found |= losses.all_differ(case, [name for name in left if name not in found and name not in told])
    return causes + _aggregated(case, {name: each for name, each in found.items() if name not in told})


def _by_column(here: Portion, scales_of_columns: np.ndarray) -> bool:
    """Whether columns are scaled by more than one number, which would be the tensor's."""
    return bool(np.std(scales_of_columns) > max(_UNEVEN, here.limit / 2) * np.mean(scales_of_columns))


def _pattern(case: Case, name: str, here: Portion | None) -> scales.Pattern | None:
    """The first that fits. What is the source's in another place is no damage. Damage in a place first where bits can be compared; in quantized tensors last, because there it is whatever
    is left over in a few blocks."""
    if here is None:
        return damage.local(case, name)
    if np.ptp(here.candidate) == 0:
        return losses.unrelated(here)
    if elsewhere := rearranged.heads(case, here) or rearranged.rows(case, name):
        return elsewhere
    damaged = None if here.quantized else damage.local(case, name)
    known = damaged or scales.zero_point(here) or scales.factors_and_offsets(here, case.weights.config)
    known = known or losses.twice(here, case.candidate[name].stored)
    return known or (damage.local(case, name) if here.quantized else None)


def _systematic(found: dict[str, scales.Pattern]) -> dict[str, scales.Pattern]:
    """The same region of several layers is nothing that damage does."""
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, pattern in found.items():
        if pattern.id == "damage.region":
            alike[place(name).kind, pattern.says].append(name)
    changed = dict(found)
    for names in alike.values():
        for name in names if len(names) > 1 else ():
            evidence = found[name].evidence
            said = (
                f"in {{what}} the same {evidence['values']} values, from {evidence['from']} to {evidence['to']}, are not the source's:"
                " a program changed them, damage does not repeat itself"
            )
            changed[name] = scales.Pattern("tensor.same-region", said, evidence)
    return changed


def _aggregated(case: Case, found: dict[str, scales.Pattern]) -> list[Cause]:
    """Patterns whose sentences differ in numbers alone become one cause, told with the first one's numbers."""
    ids = {pattern.id for pattern in found.values()}
    found = {
        name: each.otherwise if each.otherwise is not None and each.otherwise.id in ids else each
        for name, each in found.items()
    }
    found = _systematic(found)
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, pattern in found.items():
        groups[pattern.id, _NUMBER.sub("#", pattern.says)].append(name)
    causes = []
    for names in groups.values():
        pattern = found[names[0]]
        several = len(names) > 1
        what = described(names, case.weights.config)
        said = pattern.says.format(what=what, are="are" if several else "is", have="have" if several else "has")
        if several and len({found[name].says for name in names}) > 1:
            said += f" (numbers of {names[0]}; the others' differ)"
        causes.append(Cause(pattern.id, said, tuple(names), evidence=dict(pattern.evidence) | {"tensors": len(names)}))
    return causes
