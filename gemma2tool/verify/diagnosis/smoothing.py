"""Column scales moved into a norm (AWQ, SmoothQuant), and the norms that they were wrongly moved into.

Multiplying columns by s and dividing a norm's (1 + w) by s leaves the result unchanged if that norm feeds those
columns. In Gemma 2, input_layernorm feeds q, k and v, and pre_feedforward_layernorm feeds gate and up;
post_attention_layernorm feeds the residual stream.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from gemma2tool.model.lazy import Array, LazyTensor
from gemma2tool.verify.diagnosis import norms
from gemma2tool.verify.diagnosis.cause import Cause, Json
from gemma2tool.verify.diagnosis.names import LAYER_NORMS, QKV, describe, name_of, place
from gemma2tool.verify.diagnosis.row_sample import RowSample, rms
from gemma2tool.verify.diagnosis.search import Case

FED_BY = dict.fromkeys(QKV, "input_layernorm") | dict.fromkeys(("gate_proj", "up_proj"), "pre_feedforward_layernorm")
"""Kind of a matrix -> kind of the norm that feeds it."""
_CLOSE, _BETTER = 0.06, 0.4


def column_factors(sample: RowSample) -> Array | None:
    """What each column is multiplied by (columns,), where that explains the difference."""
    if len(sample.source) < 8:
        return None
    source, candidate = sample.source.astype(np.float64), sample.candidate.astype(np.float64)
    square = (source**2).sum(0)
    if not (square > 0).all():
        return None
    factors: Array = (source * candidate).sum(0) / square
    return factors if (factors > 0).all() and sample.is_explained_by(factors * source) else None


@dataclass(frozen=True)
class _Fold:
    """``kinds``: of the scaled matrices. ``norm``: the kind of norm that was divided, None: none. ``into``: "1 + w" or
    "w"."""

    kinds: tuple[str, ...]
    norm: str | None
    into: str


@dataclass
class _Folded:
    """Where a fold was found. ``norms``: names of the divided norms. ``scales``: the extremes of the scales."""

    matrices: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)


def causes_of_smoothing(case: Case, factors: dict[str, Array], unexplained: Iterable[str]) -> list[Cause]:
    """``factors``: the tensors with scaled columns, and the scales. ``unexplained``: the other tensors that differ."""
    changed = {name for name in unexplained if place(name).kind in LAYER_NORMS}
    folds: dict[_Fold, _Folded] = defaultdict(_Folded)
    groups: dict[tuple[int | None, str], list[str]] = defaultdict(list)
    for name in factors:
        kind, layer = place(name)
        groups[layer, FED_BY.get(kind, kind)].append(name)
    for (layer, _), names in groups.items():
        scale = np.mean([factors[name] for name in names], axis=0)
        norm, into = _divided_norm(case, changed, layer, scale)
        kinds = tuple(sorted({place(name).kind for name in names}))
        folded = folds[_Fold(kinds, None if norm is None else place(norm).kind, into)]
        folded.matrices += names
        folded.norms += [] if norm is None else [norm]
        folded.scales += [float(scale.min()), float(scale.max())]
    return [_cause(case, fold, folded) for fold, folded in folds.items()]


def _divided_norm(case: Case, changed: set[str], layer: int | None, scale: Array) -> tuple[str | None, str]:
    """The changed norm of the layer that was divided by the scales, and whether "1 + w" or "w" was; (None, "") where
    none was.

    The norm may be as it is in the source, or after another mistake.
    """
    names = [name_of(kind, layer) for kind in LAYER_NORMS]
    names = [name for name in names if name in changed and case.weights[name].size == scale.size]
    for signature in (None, *norms.SIGNATURES):
        for name in names:
            before = case.weights[name] if signature is None else signature.apply(case.weights, name)
            if before is None:
                continue
            source, candidate = (_vector(tensor) for tensor in (before, case.candidate[name]))
            for into, one in (("1 + w", 1.0), ("w", 0.0)):
                plain, folded = rms(candidate - source), rms((one + candidate) * scale - (one + source))
                if folded <= _CLOSE * max(rms(one + source), 1e-30) and folded <= _BETTER * plain:
                    return name, into
    return None, ""


def _vector(tensor: LazyTensor) -> Array:
    return tensor.load_rows_f32(0, tensor.rows).astype(np.float64)


def _cause(case: Case, fold: _Fold, folded: _Folded) -> Cause:
    least, most = min(folded.scales), max(folded.scales)
    matrices = describe(folded.matrices, case.weights.config)
    scaled = f"the columns of {matrices} are multiplied by scales of {least:.3g} to {most:.3g}"
    feeding = {FED_BY.get(kind) for kind in fold.kinds}
    if fold.norm is None:
        id, message = "smoothing.unfolded", f"{scaled}, but no norm is divided by them: smoothing is incomplete"
    elif feeding != {fold.norm}:
        right = " and ".join(sorted(norm or "no norm" for norm in feeding))
        id = "smoothing.wrong-norm"
        message = (
            f"{scaled}, and {fold.norm} is divided by them, which does not feed them ({right} does): the scales were "
            "folded into the wrong norm"
        )
    elif fold.into == "w":
        id = "smoothing.offset-forgotten"
        message = f"{scaled}, and in {fold.norm} w is divided by them instead of 1 + w: Gemma's norm offset was ignored"
    else:
        id = "smoothing.folded"
        message = (
            f"{scaled}, and {fold.norm} is divided by them: the candidate computes what the source computes, with "
            "other numbers (correct smoothing)"
        )
    evidence: dict[str, Json] = {"scale_least": least, "scale_most": most, "norm": fold.norm or "none"}
    return Cause(id, message, (*folded.matrices, *folded.norms), evidence=evidence)
