"""Tensors that only one side has: heads, whole layers, and single ones."""

from __future__ import annotations

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.diagnosis.fit import is_float
from gemma2tool.verify.diagnosis.names import described, listed, place, runs
from gemma2tool.verify.diagnosis.search import Case

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def causes_of_names(case: Case, candidate: Checkpoint) -> list[Cause]:
    """Causes that tensors missing from the candidate, or in it alone, tell of."""
    missing = [name for name in case.weights if name not in candidate.tensors]
    extra = [name for name in candidate.tensors if name not in case.weights]
    causes = _head(case, missing, extra)
    told = {name for cause in causes for name in cause.tensors}
    missing, extra = ([name for name in names if name not in told] for names in (missing, extra))
    ours, theirs = case.weights.config.num_hidden_layers, candidate.config.num_hidden_layers
    beyond = [name for name in missing if (place(name).layer or 0) >= theirs]
    if beyond and theirs < ours:
        said = f"the candidate has {theirs} layers, the source {ours}: {ours - theirs} {'are' if ours - theirs > 1 else 'is'} missing"
        causes.append(Cause("layer.dropped", said, tuple(beyond), ("num_hidden_layers",), {"layers": theirs}))
        missing = [name for name in missing if name not in beyond]
    added = [name for name in extra if (place(name).layer or 0) >= ours]
    if added and theirs > ours:
        said = f"the candidate has {theirs} layers, the source {ours}: layers {runs(range(ours, theirs))} are not the source's"
        causes.append(Cause("layer.added", said, tuple(added), ("num_hidden_layers",), {"layers": theirs}))
        extra = [name for name in extra if name not in added]
    config = case.weights.config
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        said = f"{described(missing, config)} {verb} not in the candidate: a name was not mapped, or a file is missing"
        causes.append(Cause("tensor.missing", said, tuple(missing)))
    if extra:
        verb = "are" if len(extra) > 1 else "is"
        said = (
            f"{listed(extra[:4])}{' and more' if len(extra) > 4 else ''} {verb} in the candidate and not in the source"
        )
        causes.append(Cause("tensor.extra", said, tuple(extra)))
    return causes


def causes_of_types(candidate: Checkpoint) -> list[Cause]:
    """Tensors stored in a quantized type that are never quantized."""
    names = [
        name for name, spec in candidate.specs.items() if not spec.quantizable and not is_float(candidate.tensors[name])
    ]
    if not names:
        return []
    types = listed(sorted({candidate.tensors[name].stored for name in names}))
    said = f"{described(names, candidate.config)} {'are' if len(names) > 1 else 'is'} quantized ({types}), which Gemma 2's norms never are"
    return [Cause("quant.not-quantizable", said, tuple(names), evidence={"types": types})]


def _head(case: Case, missing: list[str], extra: list[str]) -> list[Cause]:
    if _HEAD in missing:
        said = "lm_head.weight is lost: the source has an output matrix of its own, the candidate uses the embedding in its place"
        return [Cause("head.lost", said, (_HEAD,), ("tie_word_embeddings",))]
    if _HEAD not in extra:
        return []
    head = case.candidate[_HEAD]
    for name, tensors in (("source", case.weights), ("candidate", case.candidate)):
        table = tensors.get(_EMBEDDING)
        if table is not None and table.shape == head.shape and _equal(case, table):
            said = f"lm_head.weight is a copy of the {name}'s embedding, to which the source ties it: {head.size} values are stored twice"
            return [Cause("head.duplicated", said, (_HEAD,), ("tie_word_embeddings",), {"values": head.size})]
    said = "lm_head.weight is stored and differs from the embedding, to which the source ties it: the output matrix is another one"
    return [Cause("head.untied", said, (_HEAD,), ("tie_word_embeddings",))]


def _equal(case: Case, table) -> bool:
    limit = 0.0 if case.candidate[_HEAD].stored == table.stored else 0.9
    fit = case.fit(table, _HEAD)
    return fit.exact or fit.error <= limit
