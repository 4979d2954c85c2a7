"""Scales of columns moved into a norm (AWQ, SmoothQuant), and the norms they were moved into wrongly.

Columns times s and a norm's (1 + w) divided by s compute the same, if the norm is the one that feeds those columns. In Gemma 2 that is
input_layernorm for q, k, v and pre_feedforward_layernorm for gate and up; post_attention_layernorm feeds the residual stream.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gemma2tool.verify.diagnosis import norms
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.diagnosis.names import LAYER_NORMS, QKV, described, name_of, place
from gemma2tool.verify.diagnosis.row_sample import Portion, rms
from gemma2tool.verify.diagnosis.search import Case

FEEDS = dict.fromkeys(QKV, "input_layernorm") | dict.fromkeys(("gate_proj", "up_proj"), "pre_feedforward_layernorm")
_CLOSE, _BETTER = 0.06, 0.4


def column_factors(here: Portion) -> np.ndarray | None:
    """What each column is multiplied by (columns,), where that accounts for the difference."""
    if len(here.source) < 8:
        return None
    source, candidate = here.source.astype(np.float64), here.candidate.astype(np.float64)
    square = (source**2).sum(0)
    if not (square > 0).all():
        return None
    factors = (source * candidate).sum(0) / square
    return factors if (factors > 0).all() and here.explains(factors * source) else None


@dataclass(frozen=True)
class _Fold:
    """``norm``: the kind of norm the scales went into, None: none; ``into``: "1 + w" or "w"."""

    kinds: tuple[str, ...]
    norm: str | None
    into: str


def causes_of_smoothing(case: Case, factors: dict[str, np.ndarray], unexplained: Iterable[str]) -> list[Cause]:
    """``factors``: tensors whose columns are scaled, with what; ``unexplained``: what else differs."""
    changed = {name for name in unexplained if place(name).kind in LAYER_NORMS}
    groups: dict[_Fold, list[str]] = defaultdict(list)
    folded: dict[_Fold, list[str]] = defaultdict(list)
    spans: dict[_Fold, list[float]] = defaultdict(list)
    fed: dict[tuple[int | None, str | None], list[str]] = defaultdict(list)
    for name in factors:
        fed[place(name).layer, FEEDS.get(place(name).kind, place(name).kind)].append(name)
    for (layer, _), names in fed.items():
        scale = np.mean([factors[name] for name in names], axis=0)
        norm, into = _folded(case, changed, layer, scale)
        fold = _Fold(tuple(sorted({place(name).kind for name in names})), norm and place(norm).kind, into)
        groups[fold] += names
        folded[fold] += [norm] if norm else []
        spans[fold] += [float(scale.min()), float(scale.max())]
    return [_cause(case, fold, names, folded[fold], spans[fold]) for fold, names in groups.items()]


def _folded(case: Case, changed: set[str], layer: int | None, scale: np.ndarray) -> tuple[str | None, str]:
    """The changed norm of the layer that takes the scales back, and how; as it is in the source, or after another mistake."""
    names = [name_of(kind, layer) for kind in LAYER_NORMS]
    names = [name for name in names if name in changed and case.weights[name].size == scale.size]
    for signature in (None, *norms.SIGNATURES):
        for name in names:
            before = case.weights[name] if signature is None else signature.of(case.weights, name)
            ours, theirs = (
                each.load_rows_f32(0, scale.size).astype(np.float64) for each in (before, case.candidate[name])
            )
            for into, one in (("1 + w", 1.0), ("w", 0.0)):
                plain, folded = rms(theirs - ours), rms((one + theirs) * scale - (one + ours))
                if folded <= _CLOSE * max(rms(one + ours), 1e-30) and folded <= _BETTER * plain:
                    return name, into
    return None, ""


def _cause(case: Case, fold: _Fold, names: list[str], folded: list[str], spans: list[float]) -> Cause:
    config = case.weights.config
    what = f"the columns of {described(names, config)} are multiplied by scales of {min(spans):.3g} to {max(spans):.3g}"
    right = {FEEDS.get(kind) for kind in fold.kinds}
    evidence = {"scale_least": min(spans), "scale_most": max(spans), "norm": fold.norm or "none"}
    tensors = (*names, *folded)
    if fold.norm is None:
        said = f"{what} that no norm takes back: smoothing was left half done"
        return Cause("smoothing.unfolded", said, tensors, evidence=evidence)
    feeds = " and ".join(sorted(each or "no norm" for each in right))
    if right != {fold.norm}:
        said = f"{what}, and {fold.norm} is divided by them, which does not feed them; {feeds} does: smoothing was folded into a wrong norm"
        return Cause("smoothing.wrong-norm", said, tensors, evidence=evidence)
    if fold.into == "w":
        said = f"{what}, and {fold.norm} has w divided by them where 1 + w must be: the fold forgot Gemma's norm offset"
        return Cause("smoothing.offset-forgotten", said, tensors, evidence=evidence)
    said = f"{what}, and {fold.norm} is divided by the same: both compute what the source computes, in other numbers (smoothing folded in place)"
    return Cause("smoothing.folded", said, tensors, evidence=evidence)
