"""Config fields that differ, named as the mistake behind them; a field without a rule is reported by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.config_fields import ARITHMETIC_FIELDS, FULL, SLIDING, comparable_value
from gemma2tool.verify.diagnosis.cause import Cause, Json
from gemma2tool.verify.diagnosis.names import number_ranges

Rule = Callable[[Gemma2Config, Gemma2Config], Iterator[Cause]]

_CAPS = {"attn_logit_softcapping": "attention", "final_logit_softcapping": "final"}


def causes_of_config(
    source: Gemma2Config,
    candidate: Gemma2Config,
    *,
    cannot_represent: Mapping[str, str] | None = None,
    explained: Iterable[str] = (),
) -> list[Cause]:
    """One cause per mistake.

    ``cannot_represent``: field -> why the candidate's format cannot represent the source's value. ``explained``: fields
    that other causes explain.
    """
    done, causes = set(explained), []
    for rule in RULES:
        for cause in rule(source, candidate):
            if not done.intersection(cause.fields):
                done.update(cause.fields)
                causes.append(_with_reasons(cause, cannot_represent or {}))
    for field in ARITHMETIC_FIELDS:
        name = field.name
        if name not in done and differs(source, candidate, name):
            values = f"{getattr(candidate, name)} in the candidate, {getattr(source, name)} in the source"
            cause = _cause("config.field", f"{name} ({field.meaning}) is {values}", source, candidate, name)
            causes.append(_with_reasons(cause, cannot_represent or {}))
    return causes


def differs(source: Gemma2Config, candidate: Gemma2Config, name: str) -> bool:
    """Whether the field has values that do not mean the same."""
    return bool(comparable_value(name, getattr(source, name)) != comparable_value(name, getattr(candidate, name)))


def _cause(id: str, message: str, source: Gemma2Config, candidate: Gemma2Config, *fields: str) -> Cause:
    evidence: dict[str, Json] = {}
    for name in fields:
        evidence[f"{name}.source"] = _as_json(getattr(source, name))
        evidence[f"{name}.candidate"] = _as_json(getattr(candidate, name))
    return Cause(id, message, (), fields, evidence)


def _as_json(value: object) -> Json:
    return value if isinstance(value, (int, float)) else str(value)


def _with_reasons(cause: Cause, cannot_represent: Mapping[str, str]) -> Cause:
    """The cause, with the reasons added if the candidate's format cannot represent the source's values."""
    reasons = "; ".join(cannot_represent[name] for name in cause.fields if name in cannot_represent)
    if not reasons:
        return cause
    return Cause(cause.id, f"{cause.message} ({reasons})", cause.tensors, cause.fields, cause.evidence)


# -- the rules ---------------------------------------------------------------------------------------------------------


def _softcaps(source: Gemma2Config, candidate: Gemma2Config) -> Iterator[Cause]:
    attention, final = _CAPS
    if not any(differs(source, candidate, name) for name in _CAPS):
        return
    source_caps = getattr(source, attention), getattr(source, final)
    if source_caps == (getattr(candidate, final), getattr(candidate, attention)):
        message = (
            "the two soft caps are exchanged: attention scores are capped by the logits' cap, and logits by the "
            "attention's cap"
        )
        yield _cause("config.softcaps-swapped", message, source, candidate, *_CAPS)
    for name, word in _CAPS.items():
        if not differs(source, candidate, name):
            continue
        source_cap, candidate_cap = getattr(source, name), getattr(candidate, name)
        if candidate_cap is None:
            message = f"the {word} soft cap of {source_cap:g} is missing ({name})"
            yield _cause(f"config.{word}-softcap-missing", message, source, candidate, name)
        else:
            expected = "none" if source_cap is None else f"{source_cap:g}"
            message = f"the {word} soft cap is {candidate_cap:g}, but {expected} in the source ({name})"
            yield _cause("config.softcap-wrong", message, source, candidate, name)


def _query_scale(source: Gemma2Config, candidate: Gemma2Config) -> Iterator[Cause]:
    name = "query_pre_attn_scalar"
    if not differs(source, candidate, name):
        return
    value = candidate.query_pre_attn_scalar
    origins = {
        source.head_dim: "head_dim",
        source.hidden_size / source.num_attention_heads: "hidden_size / num_attention_heads",
        224: "what an early converter wrote for the 9B",
        144: "the 27B's value",
        256: "the default",
    }
    origin = f" ({origins[value]})" if value in origins else ""
    message = (
        f"attention scores are scaled by {value:g} ** -0.5{origin}, but by {source.query_pre_attn_scalar:g} ** -0.5 "
        f"in the source ({name})"
    )
    yield _cause("config.query-scale", message, source, candidate, name)


def _window(source: Gemma2Config, candidate: Gemma2Config) -> Iterator[Cause]:
    yield from _window_layers(source, candidate)
    name = "sliding_window"
    if not differs(source, candidate, name):
        return
    expected, window = source.sliding_window, candidate.sliding_window
    if window is None or window >= source.max_position_embeddings:
        message = f"the sliding window of {expected} is missing: every layer sees the whole text ({name})"
        yield _cause("config.window-missing", message, source, candidate, name)
    elif expected is not None and abs(expected - window) == 1:
        message = (
            f"the sliding window is off by one: {window}, but {expected} in the source (a query's own position counts)"
        )
        yield _cause("config.window-off-by-one", message, source, candidate, name)
    else:
        message = (
            f"the sliding window is {window}, but {expected if expected is not None else 'none'} in the source ({name})"
        )
        yield _cause("config.window-wrong", message, source, candidate, name)


def _window_layers(source: Gemma2Config, candidate: Gemma2Config) -> Iterator[Cause]:
    expected, types = source.layer_types or (), candidate.layer_types or ()
    if len(expected) != len(types) or expected == types:
        return
    in_source = f"in the source {_sliding_layers(expected)}"
    if all(one != other for one, other in zip(expected, types, strict=True)):
        id, message = (
            "config.window-parity",
            f"the sliding window is on the wrong layers: {_sliding_layers(types)}, but {in_source}",
        )
    elif SLIDING not in types:
        id, message = "config.window-missing", f"no layer slides, but {in_source}: every layer sees the whole text"
    elif FULL not in types:
        id, message = (
            "config.window-everywhere",
            f"every layer slides, but {in_source}: nothing is seen beyond the window",
        )
    else:
        id, message = "config.window-parity", f"different layers slide: {_sliding_layers(types)}, but {in_source}"
    yield _cause(id, message, source, candidate, "layer_types")


def _sliding_layers(types: tuple[str, ...]) -> str:
    layers = [layer for layer, kind in enumerate(types) if kind == SLIDING]
    for start, word in ((0, "even"), (1, "odd")):
        if layers == list(range(start, len(types), 2)):
            return f"the {word} layers slide"
    if not layers:
        return "no layer slides"
    return f"layer {layers[0]} slides" if len(layers) == 1 else f"layers {number_ranges(layers)} slide"


def _numbers(source: Gemma2Config, candidate: Gemma2Config) -> Iterator[Cause]:
    for id, name, subject in (
        ("config.rope-theta", "rope_theta", "the base of the rotary embedding"),
        ("config.eps", "rms_norm_eps", "the epsilon that every norm adds to the mean square"),
        ("config.rope-scaling", "rope_scaling", "the scaling of the rotary embedding"),
        ("config.activation", "hidden_activation", "the activation of the gate"),
    ):
        if differs(source, candidate, name):
            expected, value = getattr(source, name), getattr(candidate, name)
            remark = " (the exact gelu; Gemma uses the tanh approximation)" if value == "gelu" else ""
            message = f"{subject} is {_shown(value)}{remark}, but {_shown(expected)} in the source ({name})"
            yield _cause(id, message, source, candidate, name)


def _shown(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _use(source: Gemma2Config, candidate: Gemma2Config) -> Iterator[Cause]:
    name = "bos_token_id"
    if differs(source, candidate, name) and candidate.bos_token_id is not None and source.bos_token_id is not None:
        message = (
            f"texts start with token {candidate.bos_token_id}, but with {source.bos_token_id} in the source ({name})"
        )
        yield _cause("tokenizer.bos-wrong", message, source, candidate, name)
    lost = [token for token in source.eos_token_ids if token not in candidate.eos_token_ids]
    if lost and candidate.eos_token_ids:
        message = (
            f"generation does not stop at {' and '.join(map(str, lost))}: the stop tokens are "
            f"{list(candidate.eos_token_ids)}, but {list(source.eos_token_ids)} in the source; a chat does not end"
        )
        yield _cause("tokenizer.eos-wrong", message, source, candidate, "eos_token_id")
    name = "max_position_embeddings"
    if candidate.max_position_embeddings < source.max_position_embeddings:
        positions = f"{candidate.max_position_embeddings} positions, but {source.max_position_embeddings} in the source"
        yield _cause("config.context-shorter", f"the context is {positions} ({name})", source, candidate, name)


RULES: tuple[Rule, ...] = (_softcaps, _query_scale, _window, _numbers, _use)
