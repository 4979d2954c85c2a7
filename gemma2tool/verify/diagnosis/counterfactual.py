"""Names the mistake behind another program's logits: runs the reference forward pass with one mistake at a time until
it matches.

For logits without the weights behind them: a file of another program's logits for the same token ids.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma2tool.errors import UsageError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.config_fields import FULL, SLIDING
from gemma2tool.model.lazy import FLOAT32, Array, MappedRows, to_float32
from gemma2tool.model.names import EMBEDDING, HEAD
from gemma2tool.verify.diagnosis import attention, embedding, norms, transposed
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.diagnosis.config import causes_of_config
from gemma2tool.verify.diagnosis.names import QKV, join_words, place
from gemma2tool.verify.diagnosis.signature import Signature, Weights

SAME = 1e-5
"""Relative RMS difference up to which two float32 engines agree. What is left between half-precision engines is noise
that no mistake explains."""

_BETTER = 0.2
"""Share of the difference that may remain with the right mistake."""
_CERTAIN = 1e-3
"""Share below which no other mistake is tried."""

Logits = Callable[[Checkpoint, Array], Array]
"""Computes logits (1, T, V) from token ids (1, T)."""


@dataclass(frozen=True)
class Hypothesis:
    """One mistake: its cause, a checkpoint that computes with it, and the token ids (1, T) that the model sees."""

    cause: Cause
    checkpoint: Checkpoint
    ids: Array


def counterfactual(
    source: Checkpoint, ids: Array, logits: Array, *, threads: int | None = None, run: Logits | None = None
) -> Cause | None:
    """The mistake that turns the source's logits into ``logits``; None where they agree already, or where no known
    mistake does.

    ``ids``: int (T,) or (1, T). ``logits``: float (V,), (T', V) or (1, T', V), of the last T' positions; T' is T - 1 or
    T + 1 where the other engine dropped the first token or added one before it. A mistake shows only where the prompt
    lets it: a wrong window past the window, a soft cap on large scores. ``run``: by default the reference forward pass.
    Takes one forward pass per mistake, about forty. Raises ``UsageError`` for logits of another shape.
    """
    ids, given = _checked(source, ids, logits)
    run = run or _reference(threads)
    reference = run(source, ids)[0]
    without = _relative_difference(reference, given)
    if without <= SAME:
        return None
    if (cause := misplaced_logits(reference, given, without)) is not None:
        return cause
    best: tuple[float, Hypothesis] | None = None
    for hypothesis in hypotheses(source, ids):
        difference = _relative_difference(run(hypothesis.checkpoint, hypothesis.ids)[0], given)
        if best is None or difference < best[0]:
            best = difference, hypothesis
        if difference <= _CERTAIN * without:
            break
    if best is None or best[0] > _BETTER * without:
        return None
    difference, hypothesis = best
    cause = hypothesis.cause
    evidence = dict(cause.evidence) | {"difference_with": difference, "difference_without": without}
    match = (
        f"gemma2tool's forward pass gives these logits with this mistake (difference {difference:.2g}, without it "
        f"{without:.2g})"
    )
    return Cause(cause.id, f"{cause.message}: {match}", cause.tensors, cause.fields, evidence)


def _checked(source: Checkpoint, ids: Array, logits: Array) -> tuple[Array, Array]:
    """Ids int64 (1, T), logits float32 (T', V)."""
    ids = np.atleast_2d(np.asarray(ids)).astype(np.int64)
    given = np.asarray(logits)
    given = given[0] if given.ndim == 3 and given.shape[0] == 1 else given
    given = np.atleast_2d(given).astype(np.float32)
    fits = given.ndim == 2 and given.shape[1] == source.config.vocab_size and len(given) <= ids.shape[1] + 1
    if len(ids) != 1 or not fits:
        raise UsageError(
            "logits.shape",
            f"logits of shape {np.shape(logits)} for ids of shape {ids.shape}; expected (T, "
            f"{source.config.vocab_size})",
            hint="pass one prompt, and the float logits of its positions",
        )
    return ids, given


def _reference(threads: int | None) -> Logits:
    def run(checkpoint: Checkpoint, ids: Array) -> Array:
        from gemma2tool.reference.streaming import logits

        return logits(checkpoint, ids, threads=threads)

    return run


def _relative_difference(logits: Array, given: Array) -> float:
    """RMS difference over the given logits' RMS, at the last positions that both have."""
    count = min(len(logits), len(given))
    difference = logits[-count:].astype(np.float64) - given[-count:]
    size = math.sqrt(float(np.mean(np.square(given[-count:], dtype=np.float64))))
    relative = math.sqrt(float(np.mean(difference**2))) / size if size else math.inf
    return relative if math.isfinite(relative) else math.inf


# -- right logits in the wrong place -----------------------------------------------------------------------------------


def misplaced_logits(reference: Array, given: Array, without: float) -> Cause | None:
    """The reference's logits (T, V) in another order. ``given``: (T', V). ``without``: how far off they are as they
    stand."""
    for id, message, expected, actual in _orders(reference, given):
        difference = _relative_difference(expected, actual) if actual.size else math.inf
        if difference <= _BETTER * without:
            match = (
                f"otherwise they match gemma2tool's forward pass (difference {difference:.2g}, without this "
                f"{without:.2g})"
            )
            evidence = {"difference_with": difference, "difference_without": without}
            return Cause(id, f"{message}; {match}", evidence=evidence)
    return None


def _orders(reference: Array, given: Array) -> Iterator[tuple[str, str, Array, Array]]:
    """Mistakes, and the parts of the reference and the given logits that are equal if the mistake was made."""
    count, shifted, permuted = len(given), "logits.shifted-by-one", "logits.vocabulary-permuted"
    if count > len(reference):
        return
    aligned = reference[-count:]
    # The row that a shift drops, or brings in from the other end, is not compared.
    yield shifted, "the logits are one position too early: position t holds those of t + 1", aligned[1:], given[:-1]
    late = (reference[-2:-1], given) if count == 1 else (aligned[:-1], given[1:])
    yield shifted, "the logits are one position too late: position t holds those of t - 1", *late
    yield permuted, "the vocabulary is in reverse order", aligned, given[:, ::-1]
    if count > 1:
        # One position determines the order, the others tell whether it is one.
        expected, actual = (rows[1:, np.argsort(rows[0], kind="stable")] for rows in (aligned, given))
        yield permuted, "the vocabulary is in another order", expected, actual


# -- hypotheses --------------------------------------------------------------------------------------------------------


def hypotheses(source: Checkpoint, ids: Array) -> Iterator[Hypothesis]:
    """Every mistake that a forward pass can show, the most common first."""
    for config in mistaken_configs(source.config):
        causes = causes_of_config(source.config, config)
        if causes:
            yield Hypothesis(causes[0], dataclasses.replace(source, config=config, closers=[]), ids)
    for signature, message in _WEIGHT_MISTAKES:
        yield from _mistaken_weights(source, ids, signature, message)
    for id, one, other in (
        ("mlp.gate-up-swapped", "gate_proj", "up_proj"),
        ("attention.qkv-swapped", "k_proj", "v_proj"),
    ):
        yield _exchanged(source, ids, id, one, other)
    if source.config.tie_word_embeddings:
        yield _unscaled_embeddings(source, ids)
    yield from _mistaken_prompts(source, ids)


def mistaken_configs(config: Gemma2Config) -> Iterator[Gemma2Config]:
    """Configs with one mistake each."""
    layers, types = config.num_hidden_layers, config.layer_types or ()
    changes: list[dict[str, Any]] = [
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": None},
        {
            "attn_logit_softcapping": config.final_logit_softcapping,
            "final_logit_softcapping": config.attn_logit_softcapping,
        },
        *({"query_pre_attn_scalar": value} for value in _query_scalars(config)),
        {"layer_types": tuple(FULL if kind == SLIDING else SLIDING for kind in types)},
        {"layer_types": (FULL,) * layers},
        {"layer_types": (SLIDING,) * layers},
        *({"rope_theta": base} for base in (10000.0, 160000.0, 500000.0, 1000000.0)),
        *({"rms_norm_eps": eps} for eps in (1e-5, 1e-6, 1e-12)),
        *({"hidden_activation": name} for name in ("gelu", "silu", "relu", "gelu_pytorch_tanh")),
    ]
    if config.sliding_window is not None:
        windows = [config.sliding_window + 1, config.sliding_window - 1]
        changes += [{"sliding_window": window} for window in windows if window > 0]
    if config.rope_scaling:
        changes.append({"rope_scaling": None})
    for fields in changes:
        if any(getattr(config, name) != value for name, value in fields.items()):
            yield dataclasses.replace(config, **fields)


def _query_scalars(config: Gemma2Config) -> list[float]:
    per_head = config.hidden_size / config.num_attention_heads
    return list(dict.fromkeys((config.head_dim, per_head, 224, 144, 256, config.hidden_size, 1)))


def _mistaken_weights(source: Checkpoint, ids: Array, signature: Signature, message: str) -> Iterator[Hypothesis]:
    """The mistake made with every tensor that it concerns."""
    weights, changed = Weights(source.tensors, source.config), {}
    for name, tensor in source.tensors.items():
        mistaken = signature.apply(weights, name)
        if mistaken is not None and mistaken.shape == tensor.shape:
            changed[name] = mistaken
    if changed:
        cause = Cause(signature.id, message, tuple(changed))
        yield Hypothesis(cause, dataclasses.replace(source, tensors={**source.tensors, **changed}, closers=[]), ids)


def _exchanged(source: Checkpoint, ids: Array, id: str, one: str, other: str) -> Hypothesis:
    tensors, moved = dict(source.tensors), []
    for name in source.tensors:
        if place(name).kind == one:
            partner = name.replace(one, other)
            tensors[name], tensors[partner] = tensors[partner], tensors[name]
            moved += [name, partner]
    cause = Cause(id, f"{one} and {other} are exchanged", tuple(moved))
    return Hypothesis(cause, dataclasses.replace(source, tensors=tensors, closers=[]), ids)


def _unscaled_embeddings(source: Checkpoint, ids: Array) -> Hypothesis:
    """Only the input is affected: the output matrix, which is the same table, is never scaled."""
    factor, table = np.float32(1 / source.config.embed_scale), source.tensors[EMBEDDING]

    def multiply(rows: Array) -> Array:
        return to_float32(rows) * factor

    tensors = {**source.tensors, EMBEDDING: MappedRows(table, multiply, FLOAT32), HEAD: table}
    config = dataclasses.replace(source.config, tie_word_embeddings=False)
    cause = Cause("embedding.unscaled", "embeddings are not multiplied by sqrt(D)", (EMBEDDING,))
    return Hypothesis(cause, dataclasses.replace(source, config=config, tensors=tensors, closers=[]), ids)


def _mistaken_prompts(source: Checkpoint, ids: Array) -> Iterator[Hypothesis]:
    bos = source.config.bos_token_id
    if bos is None:
        return
    fields = ("bos_token_id",)
    starts_with_bos = ids[0, 0] == bos
    if ids.shape[1] > 1 and starts_with_bos:
        message = "the first token, bos, was left out: every Gemma text starts with it"
        yield Hypothesis(Cause("tokenizer.bos-missing", message, (), fields), source, ids[:, 1:])
    if ids.shape[1] < source.config.max_position_embeddings:
        how = " a second time" if starts_with_bos else ", which was given without it"
        longer = np.concatenate([np.array([[bos]]), ids], axis=1)
        yield Hypothesis(
            Cause("tokenizer.bos-doubled", f"bos was added before the prompt{how}", (), fields), source, longer
        )


def _signature(table: tuple[Signature, ...], id: str, kind: str | None = None) -> Signature:
    signature = next(signature for signature in table if signature.id == id)
    return dataclasses.replace(signature, kinds=(kind,)) if kind else signature


_WEIGHT_MISTAKES: tuple[tuple[Signature, str], ...] = (
    (_signature(norms.SIGNATURES, "norm.minus-one"), "norms multiply by w instead of 1 + w"),
    (
        _signature(norms.SIGNATURES, "norm.plus-one"),
        "norms multiply by 2 + w: the offset was added both in the file and by the program",
    ),
    (_signature(norms.SIGNATURES, "norm.rounded-with-one"), "norms multiply by 1 + w rounded to bfloat16"),
    (_signature(attention.SIGNATURES, "rope.interleaved"), "q and k are read as interleaved rotary pairs"),
    (
        _signature(attention.SIGNATURES, "rope.halved"),
        "q and k are permuted to rotary halves, which they already are in",
    ),
    (_signature(attention.SIGNATURES, "rope.interleaved", "q_proj"), "only q is read as interleaved rotary pairs"),
    (_signature(attention.SIGNATURES, "rope.interleaved", "k_proj"), "only k is read as interleaved rotary pairs"),
    (
        _signature(attention.SIGNATURES, "attention.heads-regrouped"),
        "query heads attend to the wrong key-value heads",
    ),
    (_signature(embedding.SIGNATURES, "embedding.scaled"), "embeddings are sqrt(D) times too large"),
    *(
        (signature, f"{join_words(signature.kinds)} transposed")
        for signature in transposed.SIGNATURES
        if signature.kinds != QKV
    ),
)
