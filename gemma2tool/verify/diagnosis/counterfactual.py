"""Whose logits are these? The reference forward pass with one mistake at a time, until it says what another engine said.

For logits without the weights behind them: a file of another program's logits for the same token ids.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from gemma2tool.errors import UsageError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.config_fields import FULL, SLIDING
from gemma2tool.model.lazy import FLOAT32, MappedRows, to_float32
from gemma2tool.verify.diagnosis import attention, embedding, norms, transposed
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.diagnosis.config import causes_of_config
from gemma2tool.verify.diagnosis.names import QKV, place
from gemma2tool.verify.diagnosis.signature import Signature, Weights

SAME = 1e-5
"""RMS difference over the RMS of the logits, up to which two float32 engines say the same. What is left between engines of half
precision is noise that no mistake takes away."""

_BETTER = 0.2  # of the difference without any mistake, what the right one may leave
_CERTAIN = 1e-3  # the same; no other mistake is tried then

Logits = Callable[[Checkpoint, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Supposition:
    """One mistake: its cause, the checkpoint that computes with it, and the token ids that it sees, (1, T)."""

    cause: Cause
    checkpoint: Checkpoint
    ids: np.ndarray


def counterfactual(
    source: Checkpoint, ids: np.ndarray, logits: np.ndarray, *, threads: int | None = None, run: Logits | None = None
) -> Cause | None:
    """The mistake that turns the source's logits into ``logits``; None where they agree already, or where no known one does.

    ``ids``: int (T,) or (1, T). ``logits``: (V,), (T', V) or (1, T', V), float, of the last T' positions; T' is T - 1 or T + 1
    where the other engine left the first token out or put one before it. A mistake shows only where the prompt lets it: a wrong
    window past the window, a soft cap on large scores. ``run``: computes logits (1, T, V), by default the reference forward pass.
    Costs one forward pass per mistake: about forty. Raises ``UsageError`` for logits of another shape.
    """
    ids, given = _checked(source, ids, logits)
    run = run or _reference(threads)
    ours = run(source, ids)
    plain = _off(ours, given)
    if plain <= SAME:
        return None
    if (cause := rearranged(ours[0], given, plain)) is not None:
        return cause
    best: tuple[float, Supposition] | None = None
    for supposition in suppositions(source, ids):
        off = _off(run(supposition.checkpoint, supposition.ids), given)
        if best is None or off < best[0]:
            best = off, supposition
        if off <= _CERTAIN * plain:
            break
    if best is None or best[0] > _BETTER * plain:
        return None
    off, found = best
    evidence = dict(found.cause.evidence) | {"difference_with": off, "difference_without": plain}
    said = f"{found.cause.message}: with this mistake our own forward pass gives these logits (difference {off:.2g}, without {plain:.2g})"
    return Cause(found.cause.id, said, found.cause.tensors, found.cause.fields, evidence)


def _checked(source: Checkpoint, ids: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ids = np.atleast_2d(np.asarray(ids)).astype(np.int64)
    given = np.asarray(logits)
    given = given[0] if given.ndim == 3 and given.shape[0] == 1 else given
    given = np.atleast_2d(given).astype(np.float32)
    fits = given.ndim == 2 and given.shape[1] == source.config.vocab_size and len(given) <= ids.shape[1] + 1
    if len(ids) != 1 or not fits:
        raise UsageError(
            "logits.shape",
            f"logits of shape {np.shape(logits)} for ids of shape {ids.shape}; (T, {source.config.vocab_size}) is needed",
            hint="give one prompt, and float logits of its positions",
        )
    return ids, given


def _reference(threads: int | None) -> Logits:
    def run(checkpoint: Checkpoint, ids: np.ndarray) -> np.ndarray:
        from gemma2tool.reference.streaming import logits

        return logits(checkpoint, ids, threads=threads)

    return run


def _off(ours: np.ndarray, given: np.ndarray) -> float:
    """RMS difference over the given logits' RMS, at the last positions that both have."""
    ours = ours[0]
    count = min(len(ours), len(given))
    apart = ours[-count:].astype(np.float64) - given[-count:]
    size = math.sqrt(float(np.mean(np.square(given[-count:], dtype=np.float64))))
    off = math.sqrt(float(np.mean(apart**2))) / size if size else math.inf
    return off if math.isfinite(off) else math.inf


# -- right logits in the wrong place -------------------------------------------------------------------------------------


def rearranged(ours: np.ndarray, given: np.ndarray, plain: float) -> Cause | None:
    """Our own logits (T, V) in another order; ``given``: (T', V), ``plain``: how far off they are as they stand."""
    for id, said, mine, theirs in _orders(ours, given):
        off = _off(mine[None], theirs) if theirs.size else math.inf
        if off <= _BETTER * plain:
            said += f": otherwise they are our own forward pass's (difference {off:.2g}, without {plain:.2g})"
            return Cause(id, said, evidence={"difference_with": off, "difference_without": plain})
    return None


def _orders(ours: np.ndarray, given: np.ndarray) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """The mistake, and what is equal where it was made: ours and theirs."""
    count, shifted = len(given), "logits.shifted-by-one"
    if count <= len(ours):
        aligned = ours[-count:]
        # The row that a shift leaves, or brings in from the other end, makes no claim.
        yield shifted, "the logits are one position too early: position t holds those of t + 1", aligned[1:], given[:-1]
        late = (ours[-2:-1], given) if count == 1 else (aligned[:-1], given[1:])
        yield shifted, "the logits are one position too late: position t holds those of t - 1", *late
        yield "logits.vocabulary-permuted", "the vocabulary is in reverse order", aligned, given[:, ::-1]
        if count > 1:
            # One position says in which order, the others whether it is one.
            mine, theirs = (each[1:, np.argsort(each[0], kind="stable")] for each in (aligned, given))
            yield "logits.vocabulary-permuted", "the vocabulary is in another order", mine, theirs


# -- what may have gone wrong --------------------------------------------------------------------------------------------


def suppositions(source: Checkpoint, ids: np.ndarray) -> Iterator[Supposition]:
    """Every mistake that a forward pass can show, the commonest first."""
    for config in mistaken_configs(source.config):
        causes = causes_of_config(source.config, config)
        if causes:
            yield Supposition(causes[0], dataclasses.replace(source, config=config, closers=[]), ids)
    for signature, said in _WEIGHTS:
        yield from _made_by(source, ids, signature, said)
    for id, one, other in (
        ("mlp.gate-up-swapped", "gate_proj", "up_proj"),
        ("attention.qkv-swapped", "k_proj", "v_proj"),
    ):
        yield _exchanged(source, ids, id, one, other)
    if source.config.tie_word_embeddings:
        yield _unscaled(source, ids)
    yield from _prompts(source, ids)


def mistaken_configs(config: Gemma2Config) -> Iterator[Gemma2Config]:
    """Configs with one mistake each."""
    layers = config.num_hidden_layers
    fields: list[dict[str, object]] = [
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": None},
        {
            "attn_logit_softcapping": config.final_logit_softcapping,
            "final_logit_softcapping": config.attn_logit_softcapping,
        },
        *({"query_pre_attn_scalar": value} for value in _query_scalars(config)),
        {"layer_types": tuple(FULL if kind == SLIDING else SLIDING for kind in config.layer_types)},
        {"layer_types": (FULL,) * layers},
        {"layer_types": (SLIDING,) * layers},
        *({"rope_theta": base} for base in (10000.0, 160000.0, 500000.0, 1000000.0)),
        *({"rms_norm_eps": eps} for eps in (1e-5, 1e-6, 1e-12)),
        *({"hidden_activation": name} for name in ("gelu", "silu", "relu", "gelu_pytorch_tanh")),
    ]
    if config.sliding_window is not None:
        fields += [{"sliding_window": config.sliding_window + by} for by in (1, -1) if config.sliding_window + by > 0]
    if config.rope_scaling:
        fields.append({"rope_scaling": None})
    for each in fields:
        if any(getattr(config, name) != value for name, value in each.items()):
            yield dataclasses.replace(config, **each)


def _query_scalars(config: Gemma2Config) -> list[float]:
    return list(
        dict.fromkeys(
            (config.head_dim, config.hidden_size / config.num_attention_heads, 224, 144, 256, config.hidden_size, 1)
        )
    )


def _made_by(source: Checkpoint, ids: np.ndarray, signature: Signature, said: str) -> Iterator[Supposition]:
    """The mistake made with every tensor that it concerns."""
    weights, changed = Weights(source.tensors, source.config), {}
    for name, tensor in source.tensors.items():
        made = signature.of(weights, name)
        if made is not None and made.shape == tensor.shape:
            changed[name] = made
    if changed:
        cause = Cause(signature.id, said, tuple(changed))
        yield Supposition(cause, dataclasses.replace(source, tensors={**source.tensors, **changed}, closers=[]), ids)


def _exchanged(source: Checkpoint, ids: np.ndarray, id: str, one: str, other: str) -> Supposition:
    tensors, moved = dict(source.tensors), []
    for name in source.tensors:
        if place(name).kind == one:
            partner = name.replace(one, other)
            tensors[name], tensors[partner] = tensors[partner], tensors[name]
            moved += [name, partner]
    cause = Cause(id, f"{one} and {other} were taken for each other", tuple(moved))
    return Supposition(cause, dataclasses.replace(source, tensors=tensors, closers=[]), ids)


def _unscaled(source: Checkpoint, ids: np.ndarray) -> Supposition:
    """The way in alone: the output matrix, which is the same table, was never scaled."""
    embed, factor = "model.embed_tokens.weight", np.float32(1 / source.config.embed_scale)
    table = source.tensors[embed]
    tensors = {
        **source.tensors,
        embed: MappedRows(table, lambda rows: to_float32(rows) * factor, FLOAT32),
        "lm_head.weight": table,
    }
    config = dataclasses.replace(source.config, tie_word_embeddings=False)
    cause = Cause("embedding.unscaled", "embeddings were not multiplied by sqrt(D)", (embed,))
    return Supposition(cause, dataclasses.replace(source, config=config, tensors=tensors, closers=[]), ids)


def _prompts(source: Checkpoint, ids: np.ndarray) -> Iterator[Supposition]:
    bos = source.config.bos_token_id
    if bos is None:
        return
    if ids.shape[1] > 1 and ids[0, 0] == bos:
        said = "the first token, bos, was left out: every Gemma text begins with it"
        yield Supposition(Cause("tokenizer.bos-missing", said, (), ("bos_token_id",)), source, ids[:, 1:])
    if ids.shape[1] < source.config.max_position_embeddings:
        said = "bos was put before the prompt" + (
            " a second time" if ids[0, 0] == bos else ", which was given without it"
        )
        longer = np.concatenate([np.array([[bos]]), ids], axis=1)
        yield Supposition(Cause("tokenizer.bos-doubled", said, (), ("bos_token_id",)), source, longer)


def _signature(table: tuple[Signature, ...], id: str, kind: str | None = None) -> Signature:
    found = next(each for each in table if each.id == id)
    return dataclasses.replace(found, kinds=(kind,)) if kind else found


_WEIGHTS: tuple[tuple[Signature, str], ...] = (
    (_signature(norms.SIGNATURES, "norm.minus-one"), "norms multiply by w in place of 1 + w"),
    (
        _signature(norms.SIGNATURES, "norm.plus-one"),
        "norms multiply by 2 + w: the offset was added in the file and by the program",
    ),
    (_signature(norms.SIGNATURES, "norm.rounded-with-one"), "norms multiply by 1 + w rounded to bfloat16"),
    (_signature(attention.SIGNATURES, "rope.interleaved"), "q and k are taken for interleaved rotary pairs"),
    (_signature(attention.SIGNATURES, "rope.halved"), "q and k are turned to halves, which they are already in"),
    (_signature(attention.SIGNATURES, "rope.interleaved", "q_proj"), "q alone is taken for interleaved rotary pairs"),
    (_signature(attention.SIGNATURES, "rope.interleaved", "k_proj"), "k alone is taken for interleaved rotary pairs"),
    (
        _signature(attention.SIGNATURES, "attention.heads-regrouped"),
        "query heads read other key-value heads than their own",
    ),
    (_signature(embedding.SIGNATURES, "embedding.scaled"), "embeddings are sqrt(D) times too large"),
    *(
        (each, f"{each.kinds[0] if len(each.kinds) == 1 else ' and '.join(each.kinds)} transposed")
        for each in transposed.SIGNATURES
        if each.kinds != QKV
    ),
)
