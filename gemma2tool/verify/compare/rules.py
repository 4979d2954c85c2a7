"""Which rule a tensor is compared by, and the limits that the rule gives it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from gemma2tool.model.format_facts import Rounding
from gemma2tool.model.lazy import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT_DTYPES,
    Array,
    DType,
    LazyTensor,
    to_float32,
)
from gemma2tool.verify.compare.bounds import BOUNDS, Bound
from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.gates import loosest

Rule = Literal["exact", "cast", "expected", "bound", "folded", "tuned", "reported"]
"""How a tensor is compared. The rule follows from how the candidate stores the tensor:

- ``exact``: in a float type that holds every value of the source. The bits must be equal.
- ``cast``: in a narrower float type. The bits must be those of the source rounded to it, to nearest, ties to even.
- ``expected``: the target's own convention changes the tensor (GGUF's w + 1 in float32). The bits must be those that
  the convention gives; the difference from the source is reported.
- ``bound``: in a quantized type. The error of every block must be within ``bounds.BOUNDS``; where scales were folded
  (see ``folding``), against the source with these scales.
- ``folded``: a norm that carries the scales of folded weights. Its product with them is compared, in their place.
- ``tuned``: a norm that the candidate says was tuned, within the limit of that (see ``tuned_norms``). Its difference
  from the source is reported.
- ``reported``: in a type without a known bound. The error is measured and has no limit.
"""

_HOLDS = {FLOAT32: {FLOAT32, FLOAT16, BFLOAT16}, FLOAT16: {FLOAT16}, BFLOAT16: {BFLOAT16}}

_ROUNDING = {FLOAT16: (2.0**-11, 2.0**-25), BFLOAT16: (2.0**-8, 0.0)}
"""The largest error of rounding to a type: relative, and half of the type's smallest step."""


@dataclass(frozen=True)
class TensorRules:
    """What a comparison of tensors depends on besides the tensors.

    ``expected``: the values that the candidate must have, bit for bit, where the target's convention changes them.
    ``folded``: the source's tensors with the scales that the candidate folded (see ``folding``). ``tuned``: the norms
    that the candidate says were tuned, each with the verdict of ``tuned_norms``. ``rounding``: how the candidate's
    codes were chosen. ``max_relative_rmse``: limit on RMSE / RMS in place of each type's own.
    """

    expected: Mapping[str, LazyTensor] = field(default_factory=dict)
    folded: Mapping[str, LazyTensor] = field(default_factory=dict)
    tuned: Mapping[str, str] = field(default_factory=dict)
    rounding: Rounding = "nearest"
    max_relative_rmse: float | None = None

    def bound(self, candidate: LazyTensor, *, is_folded: bool) -> Bound:
        """The bound of a tensor of a type in ``BOUNDS``."""
        bound = BOUNDS[candidate.stored].for_rounding(self.rounding)
        bound = bound.with_rounding(*_ROUNDING.get(candidate.dtype, (0.0, 0.0)))
        if self.max_relative_rmse is not None:
            bound = replace(bound, relative_rmse=self.max_relative_rmse)
        # Folded scales are known to the rounding of the tensor that carries them: too little for the sharpest limit.
        return replace(bound, nearest=math.inf) if is_folded else bound


def rule_for(source: LazyTensor, candidate: LazyTensor, *, is_expected: bool) -> Rule:
    """The rule of a tensor that is not folded."""
    if is_expected:
        return "expected"
    dtype = FLOAT_DTYPES.get(candidate.stored)
    if dtype is not None:
        return "exact" if source.dtype in _HOLDS[dtype] else "cast"
    return "bound" if candidate.stored in BOUNDS else "reported"


def cast(rows: Array, stored: str, dtype: DType) -> Array:
    """``rows`` as a candidate that stores ``stored`` and returns ``dtype`` must return them: rounded once, to nearest,
    ties to even."""
    target = dtype if dtype == rows.dtype == np.float64 else FLOAT_DTYPES.get(stored, dtype)
    if rows.dtype != target:
        with np.errstate(over="ignore"):  # a value too large becomes infinite, and is then reported as infinite
            rows = to_float32(rows).astype(target)
    return rows if rows.dtype == dtype else to_float32(rows).astype(dtype)


def kind_of(
    source: Mapping[str, LazyTensor],
    candidate: Mapping[str, LazyTensor],
    expected: Collection[str],
    comparisons: Iterable[TensorComparison] | None,
) -> str:
    """The candidate's kind, a row of ``gates.GATES``: "lossless", or the loosest type among its lossy tensors.

    It follows from the stored types alone, except that tensors which ``comparisons`` found equal do not count.
    """
    equal = {comparison.name for comparison in comparisons or () if comparison.ok and not comparison.max_abs_error}
    kinds = set()
    for name in source.keys() - equal:
        stored = candidate[name].stored
        rule = rule_for(source[name], candidate[name], is_expected=name in expected)
        if rule == "expected" and stored in FLOAT_DTYPES:
            # The arithmetic of a convention in a 16-bit type has the error of storing that type.
            kinds.add("convention" if stored == "f32" else stored)
        elif rule != "exact":
            kinds.add(stored)
    return loosest(kinds)
