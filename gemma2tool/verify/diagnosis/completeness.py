"""Tensors that only one side has: output matrices, whole layers, and single tensors."""

from __future__ import annotations

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.model.names import EMBEDDING, HEAD
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.diagnosis.fit import is_float
from gemma2tool.verify.diagnosis.names import describe, fill, join_words, number_ranges, place
from gemma2tool.verify.diagnosis.search import Case

_MAX_LISTED = 4
_EQUAL_APART_FROM_TYPE = 0.9
"""Error up to which an output matrix of another type counts as the embedding."""


def causes_of_names(case: Case, candidate: Checkpoint) -> list[Cause]:
    """Causes of tensors that only the source or only the candidate has."""
    missing = [name for name in case.weights if name not in candidate.tensors]
    extra = [name for name in candidate.tensors if name not in case.weights]
    causes = [cause for cause in (_head_cause(case, missing, extra),) if cause]
    explained = {name for cause in causes for name in cause.tensors}
    missing, extra = ([name for name in names if name not in explained] for names in (missing, extra))
    config = case.weights.config
    source_layers, candidate_layers = config.num_hidden_layers, candidate.config.num_hidden_layers
    counts = f"the candidate has {candidate_layers} layers, the source {source_layers}"
    evidence = {"layers": candidate_layers}
    beyond = [name for name in missing if (place(name).layer or 0) >= candidate_layers]
    if beyond and candidate_layers < source_layers:
        dropped = source_layers - candidate_layers
        message = f"{counts}: {dropped} {'are' if dropped > 1 else 'is'} missing"
        causes.append(Cause("layer.dropped", message, tuple(beyond), ("num_hidden_layers",), evidence))
        missing = [name for name in missing if name not in beyond]
    added = [name for name in extra if (place(name).layer or 0) >= source_layers]
    if added and candidate_layers > source_layers:
        several = "s" * (candidate_layers - source_layers > 1)
        layers = number_ranges(range(source_layers, candidate_layers))
        message = f"{counts}: layer{several} {layers} {'are' if several else 'is'} not in the source"
        causes.append(Cause("layer.added", message, tuple(added), ("num_hidden_layers",), evidence))
        extra = [name for name in extra if name not in added]
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        message = (
            f"{describe(missing, config)} {verb} missing from the candidate: a name was not mapped, or a file is "
            "missing"
        )
        causes.append(Cause("tensor.missing", message, tuple(missing)))
    if extra:
        listed = join_words(extra[:_MAX_LISTED]) + (" and others" if len(extra) > _MAX_LISTED else "")
        message = f"{listed} {'are' if len(extra) > 1 else 'is'} in the candidate, but not in the source"
        causes.append(Cause("tensor.extra", message, tuple(extra)))
    return causes


def causes_of_types(candidate: Checkpoint) -> list[Cause]:
    """Tensors stored in a quantized type that are never quantized, and unquantized ones that are not listed as such."""
    causes = _unlisted(candidate)
    names = [
        name for name, spec in candidate.specs.items() if len(spec.shape) < 2 and not is_float(candidate.tensors[name])
    ]
    if not names:
        return causes
    types = join_words(sorted({candidate.tensors[name].stored for name in names}))
    verb = "are" if len(names) > 1 else "is"
    message = f"{describe(names, candidate.config)} {verb} quantized ({types}), but Gemma 2's norms are never quantized"
    return [*causes, Cause("quant.not-quantizable", message, tuple(names), evidence={"types": types})]


def _unlisted(candidate: Checkpoint) -> list[Cause]:
    names = list(candidate.misread)
    if not names:
        return []
    template = (
        "{what} {are} stored unquantized, and the candidate's config does not list them as unquantized: libraries take"
        " what is not listed for quantized layers"
    )
    return [Cause("quant.unlisted", fill(template, names, candidate.config), tuple(names))]


def _head_cause(case: Case, missing: list[str], extra: list[str]) -> Cause | None:
    fields = ("tie_word_embeddings",)
    if HEAD in missing:
        message = (
            "lm_head.weight is lost: the source has a separate output matrix, the candidate uses the embedding instead"
        )
        return Cause("head.lost", message, (HEAD,), fields)
    if HEAD not in extra:
        return None
    head = case.candidate[HEAD]
    for side, tensors in (("source", case.weights), ("candidate", case.candidate)):
        table = tensors.get(EMBEDDING)
        if table is not None and table.shape == head.shape and _is_same_table(case, table):
            message = (
                f"lm_head.weight is a copy of the {side}'s embedding, to which the source ties it: {head.size} values "
                "are stored twice"
            )
            return Cause("head.duplicated", message, (HEAD,), fields, {"values": head.size})
    message = "lm_head.weight differs from the embedding, to which the source ties it: the output matrix is wrong"
    return Cause("head.untied", message, (HEAD,), fields)


def _is_same_table(case: Case, table: LazyTensor) -> bool:
    limit = 0.0 if case.candidate[HEAD].stored == table.stored else _EQUAL_APART_FROM_TYPE
    fit = case.fit(table, HEAD)
    return fit.exact or fit.error <= limit
