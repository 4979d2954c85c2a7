"""``diagnose``: the causes of what a verification found, the one that explains the most tensors first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import Rounding
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.compare.rules import TensorRules
from gemma2tool.verify.compare.tensors import compare_tensors
from gemma2tool.verify.compare.tokenizer import GATE as TOKENIZER
from gemma2tool.verify.compare.tokenizer import compare_tokenizers
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.diagnosis.completeness import causes_of_names, causes_of_types
from gemma2tool.verify.diagnosis.config import causes_of_config
from gemma2tool.verify.diagnosis.layers import causes_of_moves, moved_layers
from gemma2tool.verify.diagnosis.measured import causes_of_patterns
from gemma2tool.verify.diagnosis.names import fill, name_of, place
from gemma2tool.verify.diagnosis.search import Case, Explanation, search
from gemma2tool.verify.diagnosis.signature import Move, Signature, Weights
from gemma2tool.verify.diagnosis.tokenizer import causes_of_tokenizer
from gemma2tool.verify.finding import GateResult

_IMPLIED_FIELDS = {
    "layer.dropped": ("layer_types",),
    "layer.added": ("layer_types",),
    "embedding.padded": ("vocab_size",),
    "embedding.truncated": ("vocab_size",),
}
"""Config fields that necessarily change with the tensors."""


def diagnose(
    source: Checkpoint,
    candidate: Checkpoint,
    results: Sequence[GateResult],
    comparisons: Sequence[TensorComparison] | None = None,
    *,
    expected: Mapping[str, LazyTensor] | None = None,
    rounding: Rounding = "nearest",
    threads: int = 1,
) -> tuple[Cause, ...]:
    """Why ``candidate`` differs from ``source``; empty where no known mistake fits.

    ``results``: the gates' results, some of them failed. ``comparisons``: of the tensors; None: they are compared here.
    ``expected``, ``rounding``: as for ``verify``. A tensor in which two mistakes were made is named by both. Reads the
    tensors that differ and some rows of others, and holds a few MiB of them at a time.
    """
    base = Weights({**source.tensors, **(expected or {})}, source.config)
    if comparisons is None:
        comparisons = compare_tensors(
            _same_shapes(source, candidate),
            candidate.tensors,
            TensorRules(expected=expected or {}, rounding=rounding),
            threads=threads,
        )
    by_name = {comparison.name: comparison for comparison in comparisons}
    case = Case(base, Weights(source.tensors, source.config), candidate.tensors, by_name, rounding, threads)
    causes = causes_of_names(case, candidate)
    claimed = {name for cause in causes for name in cause.tensors}
    wrong = [name for name in candidate.tensors if name not in claimed and not (name in by_name and by_name[name].ok)]
    explained = search(case, wrong)
    rest = [name for name in wrong if name not in explained]
    causes += _aggregate(explained, source.config)
    causes += causes_of_patterns(replace(case, weights=_with_moved_layers(base, explained)), rest)
    causes += causes_of_types(candidate)
    causes.sort(key=lambda cause: -len(cause.tensors))
    fields = [field for cause in causes for field in (*cause.fields, *_IMPLIED_FIELDS.get(cause.id, ()))]
    cannot_represent = candidate.facts.cannot_represent
    causes += causes_of_config(source.config, candidate.config, cannot_represent=cannot_represent, explained=fields)
    if any(cause.id == "embedding.truncated" for cause in causes):  # tokens without a row are no second mistake
        cut = replace(source, config=replace(source.config, vocab_size=candidate.config.vocab_size))
        results = [compare_tokenizers(cut, candidate) if gate.name == TOKENIZER else gate for gate in results]
    causes += causes_of_tokenizer(results)
    if not causes:
        unbounded = [name for name, comparison in by_name.items() if comparison.rule in ("bound", "reported")]
        causes = causes_of_patterns(case, unbounded)
    return tuple(causes)


def _with_moved_layers(weights: Weights, explained: Mapping[str, Explanation]) -> Weights:
    """The source's tensors with moved layers where they are now, to find what else was done to some of their
    tensors."""
    moves = {
        name: mistake.origin
        for name, explanation in explained.items()
        for mistake in explanation.mistakes
        if isinstance(mistake, Move)
    }
    whole = moved_layers(moves)
    tensors = dict(weights)
    for name in weights:
        kind, layer = place(name)
        if layer in whole:
            tensors[name] = weights[name_of(kind, whole[layer])]
    return Weights(tensors, weights.config)


def _same_shapes(source: Checkpoint, candidate: Checkpoint) -> dict[str, LazyTensor]:
    """The source's tensors that the candidate has in the same shape."""
    return {
        name: tensor
        for name, tensor in source.tensors.items()
        if name in candidate.tensors and candidate.tensors[name].shape == tensor.shape
    }


def _aggregate(explained: Mapping[str, Explanation], config: Gemma2Config) -> list[Cause]:
    """One cause for all tensors in which the same mistake was made in the same way."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    signatures: dict[tuple[str, str], Signature] = {}
    moved: dict[str, str] = {}
    for name, explanation in explained.items():
        for mistake in explanation.mistakes:
            if isinstance(mistake, Move):
                moved[name] = mistake.origin
            else:
                key = mistake.id, mistake.template
                groups[key].append(name)
                signatures[key] = mistake
    causes = causes_of_moves(moved, config)
    for key, names in groups.items():
        fits = [explained[name].fit for name in names]
        exact = sum(fit.exact for fit in fits)
        message = fill(signatures[key].template, names, config, exact=exact == len(names))
        evidence = {"tensors": len(names), "bit_for_bit": exact, "largest_error": max(fit.error for fit in fits)}
        causes.append(Cause(key[0], message, tuple(names), evidence=evidence))
    return causes
