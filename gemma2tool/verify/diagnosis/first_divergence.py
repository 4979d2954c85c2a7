"""The first layer where two models diverge, and the tensors that remove the difference, for damage that no known
mistake explains.

Every layer of the candidate gets the source's own hidden states as input, so that its error does not include those of
earlier layers. In the first layer that is out of line, the source's tensors replace the candidate's, one at a time,
until the layer agrees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config_fields import ARITHMETIC_FIELDS
from gemma2tool.model.lazy import Array
from gemma2tool.model.names import EMBEDDING, HEAD
from gemma2tool.reference.streaming import StreamedForward, use_threads
from gemma2tool.verify.compare.measurements import layer_and_kind
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.diagnosis.config import differs
from gemma2tool.verify.diagnosis.names import join_words
from gemma2tool.verify.json_values import significant

ID = "unknown.layer"
TOKENS = 128
"""Tokens of the first prompt that are run."""
_ROUNDING = 1e-4
"""Relative difference of a layer's output that float32 arithmetic may cause."""
_OUT_OF_LINE = 3.0
"""Times the median layer's difference: more than the candidate's type causes elsewhere."""
_TYPICAL = 1.5
"""Times the median: as good as any other layer."""
_LOST = 0.5
"""Relative difference at which nothing of a layer's output is left to compare."""
_MAX_REPLACED = 3
"""Tensors that are replaced before giving up."""


def find_first_divergence(
    source: Checkpoint,
    candidate: Checkpoint,
    ids: Array,
    *,
    exact: bool = False,
    suspects: Iterable[str] = (),
    threads: int | None = None,
) -> Cause | None:
    """The first place where ``candidate`` diverges from ``source`` on ``ids`` (B, T), and what of the source's removes
    the difference.

    ``exact``: sound tensors of the candidate hold the source's values; otherwise a layer is out of line if it differs
    more than others do. ``suspects``: tensors known to be wrong; the first layer with one is examined where no layer is
    out of line. None where nothing is found, or where the source's own states are not finite. Both sides must have the
    same tensors in the same shapes. Reads each side once, and the layer in question about a dozen times more.
    """
    ids = ids[:1, :TOKENS]
    with use_threads(threads):
        forward = StreamedForward(candidate, ids)
        states = list(StreamedForward(source, ids).hidden_states())
        if not all(bool(torch.isfinite(state).all()) for state in states):
            return None
        embedding_error = _relative_error(forward.embeddings(), states[0], states[0])
        errors = [_layer_error(forward, layer, states) for layer in range(len(states) - 1)]
        typical = 0.0 if exact else median(errors)
        if embedding_error > max(_ROUNDING, _OUT_OF_LINE * typical):
            divergence = _Divergence("at the embeddings", "the scaled embeddings are", embedding_error)
            return divergence.cause((EMBEDDING,))
        layer = _first_out_of_line(errors, typical)
        if layer is None:
            layers = (layer_and_kind(name)[0] for name in suspects)
            layer = min((layer for layer in layers if layer is not None), default=None)
        if layer is not None:
            return _in_layer(_Models(source, candidate, ids), states, layer, errors[layer], typical)
        return _after_layers(_Models(source, candidate, ids), states[-1], typical)


@dataclass(frozen=True)
class _Models:
    """The two models, and the token ids (1, T) that they are run on."""

    source: Checkpoint
    candidate: Checkpoint
    ids: Array

    def differing_fields(self) -> tuple[str, ...]:
        return tuple(
            field.name for field in ARITHMETIC_FIELDS if differs(self.source.config, self.candidate.config, field.name)
        )

    def with_source_config(self) -> Checkpoint:
        return dataclasses.replace(self.candidate, config=self.source.config)

    def with_source_tensors(self, names: Iterable[str]) -> Checkpoint:
        replaced = {name: self.source.tensors[name] for name in names}
        return dataclasses.replace(self.candidate, tensors=self.candidate.tensors | replaced)


@dataclass(frozen=True)
class _Divergence:
    """``where``: "in layer 3". ``subject``: what is off there, with its verb. ``error``: by how much, relative to its
    size."""

    where: str
    subject: str
    error: float

    def cause(
        self,
        tensors: tuple[str, ...] = (),
        fields: tuple[str, ...] = (),
        *,
        remaining: float | None = None,
        remark: str = "",
    ) -> Cause:
        """``remaining``: the error with the source's ``tensors`` or ``fields``."""
        if remaining is not None:
            remark = f"; with the source's {join_words((*tensors, *fields))} the error is {remaining:.2g}"
        message = (
            f"no known mistake explains it: the models diverge {self.where}, where {self.subject} off by "
            f"{self.error:.2g} of the size{remark}"
        )
        evidence = {"relative_error": significant(self.error)}
        if remaining is not None:
            evidence["left"] = significant(remaining)
        return Cause(ID, message, tensors, fields, evidence)


def _in_layer(models: _Models, states: Sequence[Tensor], layer: int, error: float, typical: float) -> Cause:
    divergence = _Divergence(f"in layer {layer}", "what the layer adds to the residual stream is", error)
    agrees = max(_ROUNDING, _TYPICAL * typical) if typical < _LOST else _LOST

    def error_of(changed: Checkpoint) -> float:
        return _layer_error(StreamedForward(changed, models.ids), layer, states)

    names = [name for name in models.candidate.tensors if name.startswith(f"model.layers.{layer}.")]
    repaired = _repair(models, divergence, names, agrees, error_of)
    return repaired or divergence.cause(remark="; replacing up to three tensors with the source's does not remove it")


def _after_layers(models: _Models, state: Tensor, typical: float) -> Cause | None:
    """The final norm and the output matrix, on the source's last hidden states."""
    expected = StreamedForward(models.source, models.ids).head_logits(state)

    def error_of(changed: Checkpoint) -> float:
        return _relative_error(StreamedForward(changed, models.ids).head_logits(state), expected, expected)

    error = error_of(models.candidate)
    if error <= max(_ROUNDING, _OUT_OF_LINE * typical):
        return None
    divergence = _Divergence("after the last layer", "the logits of the source's hidden states are", error)
    names = ("model.norm.weight", HEAD, EMBEDDING)
    names_present = [name for name in names if name in models.candidate.tensors]
    agrees = max(_ROUNDING, _TYPICAL * typical)
    return _repair(models, divergence, names_present, agrees, error_of) or divergence.cause()


def _repair(
    models: _Models,
    divergence: _Divergence,
    names: Sequence[str],
    agrees: float,
    error_of: Callable[[Checkpoint], float],
) -> Cause | None:
    """The config fields, or the fewest of the tensors ``names``, with which the error is at most ``agrees``."""
    fields = models.differing_fields()
    if fields:
        remaining = error_of(models.with_source_config())
        if remaining <= agrees:
            return divergence.cause(fields=fields, remaining=remaining)
    chosen: tuple[str, ...] = ()
    for _ in range(min(_MAX_REPLACED, len(names))):
        trials = [(*chosen, name) for name in names if name not in chosen]
        errors = [error_of(models.with_source_tensors(trial)) for trial in trials]
        remaining = min(errors)
        chosen = trials[errors.index(remaining)]
        if remaining <= agrees:
            return divergence.cause(chosen, remaining=remaining)
    return None


def _first_out_of_line(errors: Sequence[float], typical: float) -> int | None:
    """The first layer with more than the typical error; where most layers are lost, the first lost one."""
    limit = _LOST if typical >= _LOST else max(_ROUNDING, _OUT_OF_LINE * typical)
    return next((layer for layer, error in enumerate(errors) if not error <= limit), None)


def _layer_error(forward: StreamedForward, layer: int, states: Sequence[Tensor]) -> float:
    """The error of what ``layer`` adds to the source's own states, relative to what the source's layer adds."""
    before, after = states[layer], states[layer + 1]
    return _relative_error(forward.run_layer(layer, before), after, after - before)


def _relative_error(actual: Tensor, expected: Tensor, scale: Tensor) -> float:
    """RMS of the difference over RMS of ``scale``; infinite where ``actual`` is not finite."""
    difference, size = (state.double().pow(2).mean().sqrt().item() for state in (actual - expected, scale))
    if not torch.isfinite(actual).all():
        return float("inf")
    return difference / size if size else float(difference > 0)
