"""Tensors that are not the source's at all: never loaded, or of a model that was trained further."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemma2tool.verify.diagnosis.fit import is_float
from gemma2tool.verify.diagnosis.names import MATRICES, place
from gemma2tool.verify.diagnosis.pattern import Pattern
from gemma2tool.verify.diagnosis.row_sample import RowSample, rms, sample_rows
from gemma2tool.verify.diagnosis.search import Case

_MOST = 0.8
"""Share of all matrices from which on it is another model."""
_SMALL = 0.3
"""Largest RMSE / RMS of weights that were trained further."""
_ALIKE = 4.0
"""Largest ratio between two of their errors."""
_UNCORRELATED = 0.15
"""Largest correlation of the change with the original values."""
_CHANGED = 0.5
"""Share of values that training changes, at half precision."""


def unrelated(sample: RowSample) -> Pattern | None:
    """Nothing of the source is in the tensor."""
    if np.ptp(sample.candidate) == 0:
        value = float(sample.candidate.flat[0])
        return Pattern("damage.constant", f"{{what}} {{are}} {value:g} everywhere: never loaded", {"value": value})
    by_chance = max(0.1, 4 / sample.source.size**0.5)
    if sample.source.size >= 64 and abs(sample.correlation) < by_chance:
        size = rms(sample.candidate)
        template = (
            f"{{what}} {{have}} nothing in common with any tensor of the source: random values (RMS {size:.3g}), like "
            "weights that were initialized and never loaded"
        )
        return Pattern("damage.random", template, {"correlation": sample.correlation, "rms": size})
    return None


def all_differ(case: Case, names: Sequence[str]) -> dict[str, Pattern]:
    """Nearly all matrices are slightly off, by about the same amount, in a way that does not depend on the values.

    ``names``: tensors that no other mistake explains. Only float types; the errors of quantized types look the same.
    """
    matrices = [name for name in case.candidate if place(name).kind in MATRICES and is_float(case.candidate[name])]
    unexplained = [name for name in names if name in matrices]
    if len(unexplained) < max(_MOST * len(matrices), 2):
        return {}
    errors: dict[str, float] = {}
    for name in unexplained:
        sample = sample_rows(case, name)
        if sample is None or not sample.limit < sample.error <= _SMALL:
            continue
        change = (sample.candidate - sample.source).astype(np.float64)
        correlation = float(np.mean(change * sample.source)) / max(rms(change) * rms(sample.source), 1e-300)
        if abs(correlation) < _UNCORRELATED and np.count_nonzero(change) > _CHANGED * change.size:
            errors[name] = sample.error
    if len(errors) < max(_MOST * len(matrices), 2) or max(errors.values()) > _ALIKE * min(errors.values()):
        return {}
    median = float(np.median(list(errors.values())))
    template = (
        f"{{what}} {{have}} different weights: each of these {len(errors)} matrices differs by about "
        f"{100 * median:.2g} % of its size, without a pattern, as after further training (or rounding through a "
        "coarser type); a conversion alone does not do this"
    )
    evidence = {"matrices": len(errors), "median": median, "largest": max(errors.values())}
    return dict.fromkeys(errors, Pattern("weights.all-differ", template, evidence))
