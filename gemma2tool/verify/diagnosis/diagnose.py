"""``diagnose``: the causes of what a verification found, the one that explains the most tensors first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.compare.tensors import compare_tensors
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.diagnosis.completeness import causes_of_names, causes_of_types
from gemma2tool.verify.diagnosis.config import causes_of_config
from gemma2tool.verify.diagnosis.layers import causes_of_moves, moved_layers
from gemma2tool.verify.diagnosis.names import described, name_of, place
from gemma2tool.verify.diagnosis.patterns import causes_of_patterns
from gemma2tool.verify.diagnosis.search import Case, Explanation, search
from gemma2tool.verify.diagnosis.signature import Move, Signature, Weights
from gemma2tool.verify.diagnosis.tokenizer import causes_of_tokenizer
from gemma2tool.verify.finding import GateResult

# Config fields that have to follow where tensors are as these causes say.
_IMPLIED = {
    "layer.dropped": ("layer_types",),
    "layer.added": ("layer_types",),
    "embedding.padded": ("vocab_size",),
    "embedding.truncated": ("vocab_size",),
}


def diagnose(
    source: Checkpoint,
    candidate: Checkpoint,
    results: Sequence[GateResult],
    comparisons: Sequence[TensorComparison] | None = None,
    *,
    expected: Mapping[str, LazyTensor] | None = None,
    weighted: bool = False,
    threads: int = 1,
) -> tuple[Cause, ...]:
    """Why ``candidate`` is not ``source``; empty where no known mistake fits.

    ``results``: the gates' findings, of which some failed. ``comparisons``: of the tensors, if they were compared; else they are
    now. ``expected``, ``weighted``: as for ``verify``. A tensor in which two mistakes were made is named by both. Reads the
    tensors that differ, some rows of others, and holds a few MiB of them at a time.
    """
    base = Weights({**source.tensors, **(expected or {})}, source.config)
    if comparisons is None:
        comparisons = compare_tensors(
            _same_shapes(source, candidate), candidate.tensors, expected=expected, weighted=weighted, threads=threads
        )
    found = {each.name: each for each in comparisons}
    case = Case(base, Weights(source.tensors, source.config), candidate.tensors, found, weighted, threads)
    names = causes_of_names(case, candidate)
    claimed = {name for cause in names for name in cause.tensors}
    wrong = [name for name in candidate.tensors if name not in claimed and not (name in found and found[name].ok)]
    explained = search(case, wrong)
    rest = [name for name in wrong if name not in explained]
    patterns = causes_of_patterns(replace(case, weights=_in_place(base, explained)), rest)
    causes = [*names, *_aggregated(explained, source.config), *patterns, *causes_of_types(candidate)]
    causes.sort(key=lambda cause: -len(cause.tensors))
    told = [field for cause in causes for field in (*cause.fields, *_IMPLIED.get(cause.id, ()))]
    cannot_represent = candidate.facts.cannot_represent
    causes += causes_of_config(source.config, candidate.config, cannot_represent=cannot_represent, told=told)
    causes += causes_of_tokenizer(results)
    if not causes:
        causes = causes_of_patterns(case, [name for name, each in found.items() if each.rule in ("bound", "reported")])
    return tuple(causes)


def _in_place(weights: Weights, explained: Mapping[str, Explanation]) -> Weights:
    """The source's tensors with layers that moved where they are now, for what else was done to some of their tensors."""
    moves = {name: step.origin for name, each in explained.items() for step in each.steps if isinstance(step, Move)}
    whole = moved_layers(moves)
    tensors = dict(weights)
    for name in weights:
        kind, layer = place(name)
        if layer in whole:
            tensors[name] = weights[name_of(kind, whole[layer])]
    return Weights(tensors, weights.config)


def _same_shapes(source: Checkpoint, candidate: Checkpoint) -> dict[str, LazyTensor]:
    theirs = candidate.tensors
    return {name: each for name, each in source.tensors.items() if name in theirs and theirs[name].shape == each.shape}


def _aggregated(explained: Mapping[str, Explanation], config: Gemma2Config) -> list[Cause]:
    """One cause for all tensors in which the same mistake was made the same way."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    signatures: dict[tuple[str, str], Signature] = {}
    moved: dict[str, str] = {}
    for name, explanation in explained.items():
        for step in explanation.steps:
            if isinstance(step, Move):
                moved[name] = step.origin
            else:
                key = step.id, step.says
                groups[key].append(name)
                signatures[key] = step
    causes = causes_of_moves(moved, config)
    for key, names in groups.items():
        fits = [explained[name].fit for name in names]
        said = signatures[key].sentence(
            described(names, config), several=len(names) > 1, exact=all(fit.exact for fit in fits)
        )
        evidence = {
            "tensors": len(names),
            "bit_for_bit": sum(fit.exact for fit in fits),
            "largest_error": max(fit.error for fit in fits),
        }
        causes.append(Cause(key[0], said, tuple(names), evidence=evidence))
    return causes
