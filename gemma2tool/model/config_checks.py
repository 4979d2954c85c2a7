"""What makes a Gemma 2 config invalid: values that are never valid, and fields that contradict each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gemma2tool.errors import InputRefused
from gemma2tool.model.config_fields import FULL, SLIDING
from gemma2tool.model.config_hf import contradiction
from gemma2tool.storage.quoting import quoted

Fields = Mapping[str, Any]
"""The fields of a ``Gemma2Config`` by name. Until they are checked they may hold anything that JSON can."""

ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "gelu_new", "silu", "relu")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# The parameters that each kind of rotary scaling requires.
ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}

_ROPE_NUMBERS = (
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
)

_POSITIVE_NUMBERS = ("rms_norm_eps", "rope_theta", "query_pre_attn_scalar")
# Positive integers and their limits, which are far beyond any model: they keep a hostile file from requesting a list of
# a billion layers or heads.
_LARGEST = {
    "vocab_size": 1 << 26,
    "hidden_size": 1 << 22,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 4096,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "max_position_embeddings": 1 << 53,
}
_MAX_ATTENTION_WIDTH = 1 << 22
_MAX_EOS = 64


def check_values(fields: Fields) -> None:
    """Check each field by itself; raises ``InputRefused`` with id ``config.value`` and the field, its value and what is
    valid."""
    _check_sizes(fields)
    _check_numbers(fields)
    _check_tokens(fields)
    for name in ("use_cache", "tie_word_embeddings", "attention_bias"):
        _require(isinstance(fields[name], bool), name, fields[name], "true or false")
    bidirectional = fields["use_bidirectional_attention"]
    valid = bidirectional is None or isinstance(bidirectional, bool)
    _require(valid, "use_bidirectional_attention", bidirectional, "true, false or null")
    activation, problem = fields["hidden_activation"], fields["problem_type"]
    _require(activation in ACTIVATIONS, "hidden_activation", activation, f"one of {ACTIVATIONS}")
    _require(problem in (None, *PROBLEM_TYPES), "problem_type", problem, f"one of {PROBLEM_TYPES}")
    for name in ("dtype", "transformers_version"):
        _require(fields[name] is None or isinstance(fields[name], str), name, fields[name], "a string")
    _require(_is_list_of_strings(fields["layer_types"]), "layer_types", fields["layer_types"], "a list of strings")
    names = fields["architectures"]
    _require(names is None or _is_list_of_strings(names), "architectures", names, "a list of strings")


def _check_sizes(fields: Fields) -> None:
    for name, largest in _LARGEST.items():
        value = fields[name]
        _require(_is_integer(value) and value > 0, name, value, "a positive integer")
        _require(value <= largest, name, value, f"at most {largest}")
    width, head_dim = fields["num_attention_heads"] * fields["head_dim"], fields["head_dim"]
    _require(width <= _MAX_ATTENTION_WIDTH, "num_attention_heads * head_dim", width, f"at most {_MAX_ATTENTION_WIDTH}")
    _require(head_dim % 2 == 0, "head_dim", head_dim, "even, because the rotary embedding rotates pairs")
    window = fields["sliding_window"]
    valid = window is None or (_is_integer(window) and window > 0)
    _require(valid, "sliding_window", window, "a positive integer or null")


def _check_numbers(fields: Fields) -> None:
    for name in _POSITIVE_NUMBERS:
        _require(_is_number(fields[name]) and fields[name] > 0, name, fields[name], "a positive number")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        cap = fields[name]
        _require(cap is None or (_is_number(cap) and cap > 0), name, cap, "a positive number or null")
    _require(_is_number(fields["initializer_range"]), "initializer_range", fields["initializer_range"], "a number")
    dropout = fields["attention_dropout"]
    _require(_is_number(dropout) and 0 <= dropout < 1, "attention_dropout", dropout, "from 0 up to 1")


def _check_tokens(fields: Fields) -> None:
    for name in ("pad_token_id", "bos_token_id"):
        _require(fields[name] is None or _is_id(fields[name]), name, fields[name], "a 32-bit integer or null")
    eos = fields["eos_token_id"]
    several = isinstance(eos, (list, tuple)) and 0 < len(eos) <= _MAX_EOS and all(map(_is_id, eos))
    expected = f"a 32-bit integer, a list of at most {_MAX_EOS} of them, or null"
    _require(eos is None or _is_id(eos) or several, "eos_token_id", eos, expected)


def check_agreement(fields: Fields) -> None:
    """Check fields that passed ``check_values`` against each other; raises ``InputRefused``, with id
    ``config.contradiction`` and both fields where they contradict each other."""
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    if heads % kv_heads:
        raise contradiction(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    layer_types, layers = fields["layer_types"], fields["num_hidden_layers"]
    if len(layer_types) != layers:
        raise contradiction(f"layer_types has {len(layer_types)} entries but num_hidden_layers is {layers}")
    for kind in layer_types:
        _require(kind in (SLIDING, FULL), "layer_types", kind, f"{SLIDING!r} or {FULL!r}")
    if fields["sliding_window"] is None and SLIDING in layer_types:
        raise contradiction("sliding_window is null but layer_types has sliding_attention layers")
    id2label, label2id = fields["id2label"], fields["label2id"]
    if label2id is not None and id2label is not None:
        _require(isinstance(label2id, Mapping), "label2id", label2id, "an object from labels to numbers")
        if {label: index for index, label in id2label.items()} != dict(label2id):
            raise contradiction("label2id is not the inverse of id2label")
    _check_rope_scaling(fields["rope_scaling"] or {}, fields["head_dim"])


def _check_rope_scaling(scaling: Mapping[str, Any], head_dim: int) -> None:
    rope_type = scaling.get("rope_type", "default")
    known = isinstance(rope_type, str) and rope_type in ROPE_TYPES
    _require(known, "rope_type", rope_type, f"one of {tuple(ROPE_TYPES)}")
    for name in ROPE_TYPES[rope_type]:
        if scaling.get(name) is None:
            raise contradiction(f"rope_type is {rope_type!r} but rope_parameters.{name} is missing")
    for name, value in scaling.items():
        if name in ("short_factor", "long_factor"):
            numbers = isinstance(value, (list, tuple)) and all(_is_number(factor) and factor > 0 for factor in value)
            _require(numbers and len(value) == head_dim // 2, name, value, f"{head_dim // 2} positive numbers")
        elif name in _ROPE_NUMBERS and value is not None:
            _require(_is_number(value) and value > 0, f"rope_parameters.{name}", value, "a positive number")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputRefused("config.value", "config: partial_rotary_factor must be 1; Gemma 2 rotates the whole head")


def _is_id(value: Any) -> bool:
    return _is_integer(value) and -(2**31) <= value < 2**31


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _require(valid: bool, name: str, value: Any, expected: str) -> None:
    if not valid:
        raise InputRefused("config.value", f"config: {name} is {quoted(value)}; it must be {expected}")
