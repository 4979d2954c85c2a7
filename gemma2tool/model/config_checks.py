"""What a Gemma 2 config may not say: values that cannot be right alone, and fields that contradict each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gemma2tool.errors import InputRefused
from gemma2tool.model.config_hf import contradiction
from gemma2tool.storage.quoting import quoted

if TYPE_CHECKING:
    from gemma2tool.model.config import Gemma2Config

SLIDING = "sliding_attention"
FULL = "full_attention"

ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "gelu_new", "silu", "relu")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# The parameters that each kind of rotary scaling cannot do without.
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

POSITIVE_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_POSITIVE_NUMBERS = ("rms_norm_eps", "rope_theta", "query_pre_attn_scalar")
# Far beyond any model; they keep a hostile file from asking for a list of a billion layers, or of as many heads.
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


def check_values(config: Gemma2Config) -> None:
    """Each field by itself; raises ``InputRefused`` with id ``config.value`` that names it and says what it must be."""
    for name in POSITIVE_INTEGERS:
        value = getattr(config, name)
        _require(_is_integer(value) and value > 0, name, value, "a positive integer")
        _require(value <= _LARGEST[name], name, value, f"at most {_LARGEST[name]}")
    width = config.num_attention_heads * config.head_dim
    _require(width <= _MAX_ATTENTION_WIDTH, "num_attention_heads * head_dim", width, f"at most {_MAX_ATTENTION_WIDTH}")
    _require(config.head_dim % 2 == 0, "head_dim", config.head_dim, "even, because the rotary embedding turns pairs")
    for name in _POSITIVE_NUMBERS:
        value = getattr(config, name)
        _require(_is_number(value) and value > 0, name, value, "a positive number")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(config, name)
        _require(value is None or (_is_number(value) and value > 0), name, value, "a positive number or null")
    _require(_is_number(config.initializer_range), "initializer_range", config.initializer_range, "a number")
    dropout = config.attention_dropout
    share = dropout is None or (_is_number(dropout) and 0 <= dropout < 1)
    _require(share, "attention_dropout", dropout, "from 0 up to 1")
    for name in ("use_cache", "tie_word_embeddings", "attention_bias"):
        _require(isinstance(getattr(config, name), bool), name, getattr(config, name), "true or false")
    value = config.use_bidirectional_attention
    known = value is None or isinstance(value, bool)
    _require(known, "use_bidirectional_attention", value, "true, false or null")
    window = config.sliding_window
    whole = window is None or (_is_integer(window) and window > 0)
    _require(whole, "sliding_window", window, "a positive integer or null")
    for name in ("pad_token_id", "bos_token_id"):
        value = getattr(config, name)
        _require(value is None or _is_id(value), name, value, "a 32-bit integer or null")
    eos = config.eos_token_id
    several = isinstance(eos, (list, tuple)) and 0 < len(eos) <= _MAX_EOS and all(map(_is_id, eos))
    expected = f"a 32-bit integer, a list of at most {_MAX_EOS} of them, or null"
    _require(eos is None or _is_id(eos) or several, "eos_token_id", eos, expected)
    activation, problem = config.hidden_activation, config.problem_type
    _require(activation in ACTIVATIONS, "hidden_activation", activation, f"one of {ACTIVATIONS}")
    _require(problem in (None, *PROBLEM_TYPES), "problem_type", problem, f"one of {PROBLEM_TYPES}")
    for name in ("dtype", "transformers_version"):
        value = getattr(config, name)
        _require(value is None or isinstance(value, str), name, value, "a string")
    for name in ("layer_types", "architectures"):
        value = getattr(config, name)
        strings = isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
        _require(value is None or strings, name, value, "a list of strings")


def check_agreement(config: Gemma2Config) -> None:
    """Fields against each other; raises ``InputRefused`` with id ``config.contradiction`` that names both."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise contradiction(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of"
            f" num_key_value_heads {config.num_key_value_heads}"
        )
    if len(config.layer_types) != config.num_hidden_layers:
        raise contradiction(
            f"layer_types has {len(config.layer_types)} entries but num_hidden_layers is {config.num_hidden_layers}"
        )
    for kind in config.layer_types:
        _require(kind in (SLIDING, FULL), "layer_types", kind, f"{SLIDING!r} or {FULL!r}")
    if config.sliding_window is None and SLIDING in config.layer_types:
        raise contradiction("sliding_window is null but layer_types has sliding_attention layers")
    if config.label2id is not None and config.id2label is not None:
        _require(isinstance(config.label2id, Mapping), "label2id", config.label2id, "an object from labels to numbers")
        if {label: index for index, label in config.id2label.items()} != dict(config.label2id):
            raise contradiction("label2id is not the inverse of id2label")
    scaling = config.rope_scaling or {}
    rope_type = scaling.get("rope_type", "default")
    _require(
        isinstance(rope_type, str) and rope_type in ROPE_TYPES, "rope_type", rope_type, f"one of {tuple(ROPE_TYPES)}"
    )
    for name in ROPE_TYPES[rope_type]:
        if scaling.get(name) is None:
            raise contradiction(f"rope_type is {rope_type!r} but rope_parameters.{name} is missing")
    for name, value in scaling.items():
        if name in ("short_factor", "long_factor"):
            numbers = isinstance(value, (list, tuple)) and all(_is_number(each) and each > 0 for each in value)
            _require(numbers and len(value) == config.head_dim // 2, name, value, f"{config.head_dim // 2} numbers")
        elif name in _ROPE_NUMBERS and value is not None:
            _require(_is_number(value) and value > 0, f"rope_parameters.{name}", value, "a positive number")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputRefused("config.value", "config: partial_rotary_factor must be 1; Gemma 2 turns the whole head")


def _is_id(value: Any) -> bool:
    return _is_integer(value) and -(2**31) <= value < 2**31


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise InputRefused("config.value", f"config: {name} is {quoted(value)}; it must be {expected}")
