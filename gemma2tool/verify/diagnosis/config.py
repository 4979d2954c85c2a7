"""Config fields that differ, told as the mistake behind them; what no rule knows is told as the field itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.config_fields import ARITHMETIC_FIELDS, FULL, SLIDING, comparable_value
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.diagnosis.names import runs

Rule = Callable[[Gemma2Config, Gemma2Config], Iterator[Cause]]

_CAPS = {"attn_logit_softcapping": "attention", "final_logit_softcapping": "final"}


def causes_of_config(
    source: Gemma2Config,
    candidate: Gemma2Config,
    *,
    cannot_represent: Mapping[str, str] | None = None,
    told: Iterable[str] = (),
) -> list[Cause]:
    """One cause per mistake. ``cannot_represent``: field -> why the candidate's format cannot represent it; ``told``: fields that other causes
    explain."""
    told, causes = set(told), []
    for rule in RULES:
        for cause in rule(source, candidate):
            if not told.intersection(cause.fields):
                told.update(cause.fields)
                causes.append(_explained(cause, cannot_represent or {}))
    for name, meaning in ((field.name, field.meaning) for field in ARITHMETIC_FIELDS):
        if name not in told and differs(source, candidate, name):
            said = f"{name} ({meaning}) is {getattr(candidate, name)} in the candidate, {getattr(source, name)} in the source"
            causes.append(_explained(_cause("config.field", said, source, candidate, name), cannot_represent or {}))
    return causes


def differs(source: Gemma2Config, candidate: Gemma2Config, name: str) -> bool:
    return comparable_value(name, getattr(source, name)) != comparable_value(name, getattr(candidate, name))


def _cause(id: str, said: str, source: Gemma2Config, candidate: Gemma2Config, *fields: str) -> Cause:
    evidence = {}
    for name in fields:
        evidence |= {
            f"{name}.source": _plain(getattr(source, name)),
            f"{name}.candidate": _plain(getattr(candidate, name)),
        }
    return Cause(id, said, (), fields, evidence)


def _plain(value: object) -> float | str:
    return value if isinstance(value, (int, float)) else str(value)


def _explained(cause: Cause, cannot_represent: Mapping[str, str]) -> Cause:
    why = "; ".join(cannot_represent[name] for name in cause.fields if name in cannot_represent)
    return Cause(cause.id, f"{cause.message} ({why})", cause.tensors, cause.fields, cause.evidence) if why else cause


# -- the rules -----------------------------------------------------------------------------------------------------------


def _softcaps(source: Gemma2Config, candidate: Gemma2Config) -> Iterator[Cause]:
    attention, final = _CAPS
    if not any(differs(source, candidate, name) for name in _CAPS):
        return
    if (getattr(source, attention), getattr(source, final)) == (
        getattr(candidate, final),
        getattr(candidate, attention),
    ):
        said = "the two soft caps are in each other's place: attention scores are capped where logits should be, and the other way round"
        yield _cause("config.softcaps-swapped", said, source, candidate, *_CAPS)
    for name, word in _CAPS.items():
        if not differs(source, candidate, name):
            continue
        ours, theirs = getattr(source, name), getattr(candidate, name)
        if theirs is None:
            said = f"the {word} soft cap of {ours:g} is missing ({name})"
            yield _cause(f"config.{word}-softcap-missing", said, source, candidate, name)
        else:
            said = f"the {word} soft cap is {theirs:g}, where the source has {'none' if ours is None else f'{ours:g}'} ({name})"
            yield _cause("config.softcap-wrong", said, source, candidate, name)


def _query_scale(source: Gemma2Config, candidate: Gemma2Config) -> Iterator[Cause]:
    name = "query_pre_attn_scalar"
    if not differs(source, candidate, name):
        return
    value = candidate.query_pre_attn_scalar
    known = {
        source.head_dim: "head_dim",
        source.hidden_size / source.num_attention_heads: "hidden_size / num_attention_heads",
        224: "what an early converter wrote for the 9B",
        144: "the 27B's",
        256: "the default",
    }
    why = f" ({known[value]})" if value in known else ""
    said = f"attention scores are scaled by {value:g} ** -0.5{why}, where the source has {source.query_pre_attn_scalar:g} ({name})"
    yield _cause("config.query-scale", said, source, candidate, name)


def _window(source: Gemma2Config, candidate: Gemma2Config) -> Iterator[Cause]:
    ours, theirs = source.layer_types, candidate.layer_types
    if len(ours) == len(theirs) and ours != theirs:
        if all(one != other for one, other in zip(ours, theirs, strict=True)):
            said = (
                f"the sliding window is on the wrong layers: {_sliding(theirs)}, where in the source {_sliding(ours)}"
            )
            yield _cause("config.window-parity", said, source, candidate, "layer_types")
        elif SLIDING not in theirs:
            said = f"no layer slides, where in the source {_sliding(ours)}: every layer sees all of the text"
            yield _cause("config.window-missing", said, source, candidate, "layer_types")
        elif FULL not in theirs:
            said = f"every layer slides, where in the source {_sliding(ours)}: nothing is seen beyond the window"
            yield _cause("config.window-everywhere", said, source, candidate, "layer_types")
        else:
            said = f"other layers slide: {_sliding(theirs)}, where in the source {_sliding(ours)}"
            yield _cause("config.window-parity", said, source, candidate, "layer_types")
    name = "sliding_window"
    if not differs(source, candidate, name):
        return
    here, there = source.sliding_window, candidate.sliding_window
    if there is None or there >= source.max_position_embeddings:
        said = f"the sliding window of {here} is missing: every layer sees all of the text ({name})"
        yield _cause("config.window-missing", said, source, candidate, name)
    elif here is not None and abs(here - there) == 1:
        said = f"the sliding window is off by one: {there}, where the source has {here} (a query counts among the keys that it sees)"
        yield _cause("config.window-off-by-one", said, source, candidate, name)
    else:
        said = f"the sliding window is {there}, where the source has {here if here is not None else 'none'} ({name})"
        yield _cause("config.window-wrong", said, source, candidate, name)


def _sliding(types: tuple[str, ...]) -> str:
    layers = [layer for layer, kind in enumerate(types) if kind == SLIDING]
    for start, word in ((0, "even"), (1, "odd")):
        if layers == list(range(start, len(types), 2)):
            return f"the {word} ones slide"
    return f"{runs(layers)} slide" if layers else "none slides"


def _numbers(source: Gemma2Config, candidate: Gemma2Config) -> Iterator[Cause]:
    for id, name, what in (
        ("config.rope-theta", "rope_theta", "the base of the rotary embedding"),
        ("config.eps", "rms_norm_eps", "what every norm adds to the mean square"),
        ("config.rope-scaling", "rope_scaling", "the scaling of the rotary embedding"),
        ("config.activation", "hidden_activation", "the activation of the gate"),
    ):
        if differs(source, candidate, name):
            ours, theirs = getattr(source, name), getattr(candidate, name)
            why = " (the exact gelu, where Gemma uses its tanh approximation)" if theirs == "gelu" else ""
            said = f"{what} is {_said(theirs)}{why}, where the source has {_said(ours)} ({name})"
            yield _cause(id, said, source, candidate, name)


def _said(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _use(source: Gemma2Config, candidate: Gemma2Config) -> Iterator[Cause]:
    name = "bos_token_id"
    if differs(source, candidate, name) and candidate.bos_token_id is not None and source.bos_token_id is not None:
        said = f"texts begin with token {candidate.bos_token_id}, where the source begins them with {source.bos_token_id} ({name})"
        yield _cause("tokenizer.bos-wrong", said, source, candidate, name)
    lost = [token for token in source.eos_token_ids if token not in candidate.eos_token_ids]
    if lost and candidate.eos_token_ids:
        said = f"generation does not stop at {' and '.join(map(str, lost))}: the list of ends is {list(candidate.eos_token_ids)}, in the"
        said += f" source {list(source.eos_token_ids)}; a chat runs on"
        yield _cause("tokenizer.eos-wrong", said, source, candidate, "eos_token_id")
    name = "max_position_embeddings"
    if candidate.max_position_embeddings < source.max_position_embeddings:
        said = f"the context ends at {candidate.max_position_embeddings}, in the source at {source.max_position_embeddings} ({name})"
        yield _cause("config.context-shorter", said, source, candidate, name)


RULES: tuple[Rule, ...] = (_softcaps, _query_scale, _window, _numbers, _use)
