"""Where two models part, and what brings them together again, when no known mistake explains it.

Every layer of the candidate is given the source's own hidden states, so that no layer answers for those before it. In the
first that is out of line, the source's tensors are put in place of the candidate's, one after the other, until it agrees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import Tensor

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config_fields import ARITHMETIC_FIELDS, comparable_value
from gemma2tool.reference.streaming import StreamedForward, use_threads
from gemma2tool.verify.compare.measurements import layer_and_kind
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.json_values import significant

ID = "unknown.layer"
TOKENS = 128  # of the first prompt that are looked at
_AGREES = 1e-4  # relative difference of a layer's output that float32 arithmetic may make
_OUT_OF_LINE = 3.0  # times the median layer's difference: beyond what the candidate's type costs elsewhere
_USUAL = 1.5  # times the median: as good as any other layer
_LOST = 0.5  # relative difference at which nothing of a layer's output is left to compare
_MOST_TENSORS = 3  # that are put back before giving up


def find_parting(
    source: Checkpoint,
    candidate: Checkpoint,
    ids: np.ndarray,
    *,
    exact: bool = False,
    suspects: Iterable[str] = (),
    threads: int | None = None,
) -> Cause | None:
    """The first place where ``candidate`` parts from ``source`` on ``ids`` (B, T), and what of the source's brings it back.

    ``exact``: whether sound tensors of the candidate hold the source's values; else a layer stands out by differing more than
    others do. ``suspects``: tensors known to be wrong; the first layer of theirs is looked at where no layer stands out. None
    where nothing does, or where the source's own states are not finite. Both must hold the same tensors in the same shapes.
    Reads each side once, and the layer in question about a dozen times more.
    """
    ids = ids[:1, :TOKENS]
    with use_threads(threads):
        ours, theirs = (StreamedForward(each, ids) for each in (source, candidate))
        states = list(ours.hidden_states())
        if not all(bool(torch.isfinite(state).all()) for state in states):
            return None
        embedded = _apart(theirs.embeddings(), states[0], states[0])
        errors = [_layer_error(theirs, layer, states) for layer in range(len(states) - 1)]
        usual = 0.0 if exact else median(errors)
        if embedded > max(_AGREES, _OUT_OF_LINE * usual):
            return _told("at the embeddings", "the scaled embeddings are", embedded, ("model.embed_tokens.weight",))
        layer = _first_out_of_line(errors, usual)
        if layer is None:
            layer = min((found for each in suspects if (found := layer_and_kind(each)[0]) is not None), default=None)
        if layer is not None:
            return _in_layer(source, candidate, ids, states, errors[layer], usual, layer)
        return _after_layers(source, candidate, ids, states[-1], usual)


@dataclass(frozen=True)
class _Exchange:
    """The candidate with some of the source's tensors in place of its own, and what that leaves of the difference."""

    names: tuple[str, ...]
    left: float


def _in_layer(
    source: Checkpoint,
    candidate: Checkpoint,
    ids: np.ndarray,
    states: Sequence[Tensor],
    error: float,
    usual: float,
    layer: int,
) -> Cause:
    where, what = f"in layer {layer}", "what it adds to the residual stream is"
    agrees = max(_AGREES, _USUAL * usual) if usual < _LOST else _LOST

    def left(changed: Checkpoint) -> float:
        return _layer_error(StreamedForward(changed, ids), layer, states)

    if fields := _differing_fields(source, candidate):
        remains = left(dataclasses.replace(candidate, config=source.config))
        if remains <= agrees:
            said = f"; with the source's {_listed(fields)} it is {remains:.2g}"
            return _told(where, what, error, fields=fields, more=said, left=remains)
    names = [name for name in candidate.tensors if name.startswith(f"model.layers.{layer}.")]
    best = _put_back(source, candidate, names, agrees, error, left)
    if best is None:
        return _told(where, what, error, more="; no few tensors of the source's bring it back")
    said = f"; with the source's {_listed(best.names)} it is {best.left:.2g}"
    return _told(where, what, error, best.names, more=said, left=best.left)


def _after_layers(
    source: Checkpoint, candidate: Checkpoint, ids: np.ndarray, state: Tensor, usual: float
) -> Cause | None:
    """The final norm and the output matrix, on the source's last hidden states."""
    wanted = StreamedForward(source, ids).head_logits(state)

    def left(changed: Checkpoint) -> float:
        got = StreamedForward(changed, ids).head_logits(state)
        return _apart(got, wanted, wanted)

    error = left(candidate)
    agrees = max(_AGREES, _USUAL * usual)
    if error <= max(_AGREES, _OUT_OF_LINE * usual):
        return None
    where, what = "after the last layer", "logits of the source's hidden states are"
    names = [
        name
        for name in ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight")
        if name in candidate.tensors
    ]
    fields = _differing_fields(source, candidate)
    if fields and (remains := left(dataclasses.replace(candidate, config=source.config))) <= agrees:
        said = f"; with the source's {_listed(fields)} they are {remains:.2g}"
        return _told(where, what, error, fields=fields, more=said, left=remains)
    best = _put_back(source, candidate, names, agrees, error, left)
    if best is None:
        return _told(where, what, error)
    return _told(
        where,
        what,
        error,
        best.names,
        more=f"; with the source's {_listed(best.names)} {best.left:.2g}",
        left=best.left,
    )


def _put_back(
    source: Checkpoint,
    candidate: Checkpoint,
    names: Iterable[str],
    agrees: float,
    error: float,
    left: Callable[[Checkpoint], float],
) -> _Exchange | None:
    """The fewest of the source's tensors, found one at a time, with which the difference is no more than ``agrees``."""
    names = list(names)
    best = _Exchange((), error)
    for _ in range(min(_MOST_TENSORS, len(names))):
        tried = []
        for name in names:
            if name not in best.names:
                chosen = (*best.names, name)
                theirs = {each: source.tensors[each] for each in chosen}
                tried.append(
                    _Exchange(chosen, left(dataclasses.replace(candidate, tensors=candidate.tensors | theirs)))
                )
        best = min(tried, key=lambda each: each.left)
        if best.left <= agrees:
            return best
    return None


def _first_out_of_line(errors: Sequence[float], usual: float) -> int | None:
    """The first layer whose error is more than is usual; where most are lost, the first that is."""
    limit = _LOST if usual >= _LOST else max(_AGREES, _OUT_OF_LINE * usual)
    return next((layer for layer, error in enumerate(errors) if not error <= limit), None)


def _layer_error(run: StreamedForward, layer: int, states: Sequence[Tensor]) -> float:
    """Of what ``layer`` adds to the source's own states, relative to what the source's layer adds."""
    before, after = states[layer], states[layer + 1]
    return _apart(run.run_layer(layer, before), after, after - before)


def _apart(got: Tensor, wanted: Tensor, scale: Tensor) -> float:
    difference, size = ((each.double().pow(2).mean().sqrt().item()) for each in (got - wanted, scale))
    if not torch.isfinite(got).all():
        return float("inf")
    return difference / size if size else float(difference > 0)


def _differing_fields(source: Checkpoint, candidate: Checkpoint) -> tuple[str, ...]:
    return tuple(
        name
        for name in (field.name for field in ARITHMETIC_FIELDS)
        if comparable_value(name, getattr(source.config, name))
        != comparable_value(name, getattr(candidate.config, name))
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _told(
    where: str,
    what: str,
    error: float,
    tensors: tuple[str, ...] = (),
    *,
    fields: tuple[str, ...] = (),
    more: str = "",
    left: float | None = None,
) -> Cause:
    message = (
        f"no known mistake explains it: the models part {where}, where {what} off by {error:.2g} of its size{more}"
    )
    evidence = {"relative_error": significant(error)} | ({} if left is None else {"left": significant(left)})
    return Cause(ID, message, tensors, fields, evidence)
