"""How Hugging Face's config.json spells a Gemma 2 config, in one place.

Two generations of files exist. The several names of a field are known here and nowhere else:

=====================  ==========================================  =========================================
field                  transformers 4                              transformers 5
=====================  ==========================================  =========================================
hidden_activation      ``hidden_act`` beside ``hidden_activation``  ``hidden_activation``
sliding_window         also ``sliding_window_size`` (27B)           ``sliding_window``
rotary embedding       ``rope_theta``, ``rope_scaling``             ``rope_parameters``
dtype                  ``torch_dtype``                              ``dtype``
layer_types            absent: even layers slide                    written out
bidirectional          (none)                                       ``use_bidirectional_attention``,
                                                                    ``is_causal`` false
=====================  ==========================================  =========================================

``read`` returns the keyword arguments of ``Gemma2Config`` for either; ``write`` returns transformers 5's spelling with
every field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gemma2tool.errors import InputRefused

# Defaults of the sizes that a file may omit, in transformers 4.42 to 4.46 and from 4.47 on (where they became the
# 2B's).
_SIZES_UNTIL_4_46 = {
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 224,
}
_SIZES_SINCE_4_47 = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
}

# Fields whose name and meaning never changed; read and written unchanged.
_PLAIN = (
    "architectures",
    "attention_bias",
    "attention_dropout",
    "attn_logit_softcapping",
    "bos_token_id",
    "eos_token_id",
    "final_logit_softcapping",
    "head_dim",
    "id2label",
    "initializer_range",
    "label2id",
    "layer_types",
    "max_position_embeddings",
    "pad_token_id",
    "problem_type",
    "rms_norm_eps",
    "tie_word_embeddings",
    "transformers_version",
    "use_bidirectional_attention",
    "use_cache",
    "vocab_size",
)
_RESOLVED = (
    "model_type",
    "hidden_activation",
    "hidden_act",
    "sliding_window",
    "sliding_window_size",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "dtype",
    "torch_dtype",
    "num_labels",
)
_KNOWN = frozenset(_PLAIN) | frozenset(_RESOLVED) | frozenset(_SIZES_SINCE_4_47)

# For these fields null means the same as absent; for the others null is a value (no soft cap, no padding token).
_NULL_IS_ABSENT = (
    "architectures",
    "attention_dropout",
    "layer_types",
    "id2label",
    "label2id",
    "problem_type",
    "transformers_version",
)
_WRITTEN_ONLY_WHEN_SET = (*_NULL_IS_ABSENT, "dtype")


def contradiction(message: str, hint: str = "correct config.json, or pass the right one with --config") -> InputRefused:
    return InputRefused("config.contradiction", f"config: {message}", hint=hint)


def read(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of ``Gemma2Config`` for a parsed config.json of any generation.

    Raises ``InputRefused`` where the file is not a Gemma 2 config, or two spellings of one field disagree.
    """
    if not isinstance(source, Mapping):
        raise InputRefused("config.not-an-object", f"config: expected a JSON object, found {type(source).__name__}")
    model_type = source.get("model_type", "gemma2")
    if model_type != "gemma2":
        raise InputRefused("config.not-gemma2", f"config: model_type is {model_type!r}, not 'gemma2'")

    notes: list[str] = []
    fields = {name: source[name] for name in _PLAIN if name in source}
    for name in _NULL_IS_ABSENT:
        if fields.get(name) is None:
            fields.pop(name, None)
    fields |= _sizes(source)
    if isinstance(fields.get("layer_types"), list) and not fields["layer_types"]:
        raise contradiction(f"layer_types has 0 entries but num_hidden_layers is {fields['num_hidden_layers']}")
    fields |= _activation(source, notes)
    fields |= _rope(source)
    fields |= _labels(source, notes)
    fields |= _bidirectional(source, notes)
    fields |= _window(source, notes)
    fields |= _dtype(source, notes)
    if "attn_logit_softcapping" not in source:
        notes.append(
            "attn_logit_softcapping is absent (transformers 4.42.0 omitted and ignored it); 50.0 is assumed, with which"
            " the released models were trained"
        )
    if "final_logit_softcapping" not in source:
        notes.append("final_logit_softcapping is absent; 30.0 is assumed, with which the released models were trained")
    fields["extra"] = {key: value for key, value in source.items() if key not in _KNOWN}
    fields["notes"] = tuple(notes)
    return fields


def write(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json object for the fields of a ``Gemma2Config``: transformers 5's spelling and order of
    keys."""
    out: dict[str, Any] = dict(fields["extra"])
    out["model_type"] = "gemma2"
    for name in (*_PLAIN, *_SIZES_SINCE_4_47, "hidden_activation", "sliding_window", "dtype"):
        value = fields[name]
        if value is None and name in _WRITTEN_ONLY_WHEN_SET:
            continue
        out[name] = list(value) if isinstance(value, tuple) else value
    id2label = fields["id2label"]
    if id2label is not None:
        out["id2label"] = {str(index): label for index, label in id2label.items()}
        out["label2id"] = fields["label2id"] or {label: index for index, label in id2label.items()}
    out["rope_parameters"] = rope_parameters(fields["rope_theta"], fields["rope_scaling"])
    return dict(sorted(out.items()))


def rope_parameters(rope_theta: float, rope_scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """Base and scaling of the rotary embedding in one object, as transformers 5 writes them."""
    return {"rope_theta": rope_theta, "rope_type": "default"} | dict(rope_scaling or {})


def _window(source: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """``sliding_window_size`` stands in the first 27B files; transformers reads ``sliding_window`` alone."""
    names = [name for name in ("sliding_window", "sliding_window_size") if name in source]
    values = [source[name] for name in names if source[name] is not None]
    if len(values) == 2 and values[0] != values[1]:
        notes.append(
            f"sliding_window_size {values[1]!r} is ignored, as in transformers: sliding_window is {values[0]!r}"
        )
    return {"sliding_window": values[0] if values else None} if names else {}


def _dtype(source: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """transformers prefers ``dtype``. The weights' own types count in any case."""
    dtype, old = (_dtype_name(source.get(key)) for key in ("dtype", "torch_dtype"))
    if dtype is not None and old is not None and dtype != old:
        notes.append(f"torch_dtype is {old!r} but dtype is {dtype!r}, which is used, as in transformers")
    used = old if dtype is None else dtype
    return {} if used is None else {"dtype": used}


def _dtype_name(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value


def _sizes(source: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: source[name] for name in _SIZES_SINCE_4_47 if name in source}
    missing = [name for name in _SIZES_SINCE_4_47 if name not in source]
    if not missing:
        return given
    version = re.match(r"(\d+)\.(\d+)", str(source.get("transformers_version", "")))
    if version is None:
        raise InputRefused(
            "config.size-missing",
            f"config: {', '.join(missing)} missing, and without transformers_version the default is unknown"
            f" (transformers changed it in 4.47)",
            hint="add the missing fields to config.json",
        )
    defaults = _SIZES_UNTIL_4_46 if (int(version[1]), int(version[2])) < (4, 47) else _SIZES_SINCE_4_47
    return given | {name: defaults[name] for name in missing}


def _activation(source: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """transformers reads ``hidden_activation`` alone; ``hidden_act`` is a leftover of the first Gemma's files."""
    name, leftover = source.get("hidden_activation"), source.get("hidden_act")
    used = "gelu_pytorch_tanh" if name is None else name
    if leftover is not None and leftover != used:
        assumed = " (the default)" if name is None else ""
        notes.append(f"hidden_act {leftover!r} is ignored, as in transformers: hidden_activation is {used}{assumed}")
    return {} if name is None else {"hidden_activation": name}


def _bidirectional(source: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """``is_causal`` is a key of all of transformers' decoders (since 5.2) and stays among the others for writing."""
    if "is_causal" not in source:
        return {}
    causal, both_ways = source["is_causal"], source.get("use_bidirectional_attention")
    if causal is not None and not isinstance(causal, bool):
        raise InputRefused("config.value", f"config: is_causal is {causal!r}; it must be true or false")
    if causal and both_ways:
        raise contradiction("is_causal is true but use_bidirectional_attention is true")
    if causal is None:
        notes.append("is_causal is null, which transformers reads as false: tokens attend both ways")
    return {} if causal else {"use_bidirectional_attention": True}


def _rope(source: Mapping[str, Any]) -> dict[str, Any]:
    spelled = {key: _rope_object(source[key], key) for key in ("rope_parameters", "rope_scaling") if source.get(key)}
    theta = source.get("rope_theta")
    for key, parameters in spelled.items():
        other = parameters.pop("rope_theta", None)
        if theta is not None and other is not None and theta != other:
            raise contradiction(f"rope_theta is {theta!r} but {key}.rope_theta is {other!r}")
        theta = other if theta is None else theta
    if len(spelled) == 2 and spelled["rope_parameters"] != spelled["rope_scaling"]:
        raise contradiction("rope_parameters and rope_scaling disagree")
    scaling = next(iter(spelled.values()), None)
    fields: dict[str, Any] = {} if theta is None else {"rope_theta": theta}
    if scaling and scaling != {"rope_type": "default"}:
        fields["rope_scaling"] = scaling
    return fields


def _rope_object(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or any(isinstance(item, Mapping) for item in value.values()):
        raise InputRefused("config.rope", f"config: {key} must be a flat object, found {value!r}")
    parameters = dict(value)
    old_name = parameters.pop("type", None)
    rope_type = parameters.setdefault("rope_type", old_name or "default")
    if old_name is not None and old_name != rope_type:
        raise contradiction(f"{key}.type is {old_name!r} but {key}.rope_type is {rope_type!r}")
    return parameters


def _labels(source: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    id2label, count = source.get("id2label"), source.get("num_labels")
    if id2label is not None:
        try:
            id2label = {int(index): label for index, label in id2label.items()}
            named = all(isinstance(label, str) for label in id2label.values())
        except (AttributeError, TypeError, ValueError):
            named = False
        if not named:
            message = f"config: id2label must map numbers to labels, found {id2label!r}"
            raise InputRefused("config.labels", message)
        if count is not None and count != len(id2label):
            raise contradiction(f"num_labels is {count!r} but id2label has {len(id2label)} labels")
        return {"id2label": id2label} | _label2id(source, id2label, notes)
    if count is None:
        return {}
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 1_000_000:
        raise InputRefused("config.labels", f"config: num_labels must be a positive integer, found {count!r}")
    return {"id2label": {index: f"LABEL_{index}" for index in range(count)}}


def _label2id(source: Mapping[str, Any], id2label: Mapping[int, str], notes: list[str]) -> dict[str, Any]:
    """The inverse of ``id2label``, by which transformers names classes, where the file has another one."""
    label2id, inverse = source.get("label2id"), {label: index for index, label in id2label.items()}
    if not isinstance(label2id, Mapping) or label2id == inverse:
        return {}
    if label2id != {label: str(index) for label, index in inverse.items()}:
        notes.append(
            "label2id is not the inverse of id2label, by which classes are named; it is written as the inverse"
        )
    return {"label2id": inverse}
