"""A Gemma 2 config to ``gemma2.*`` key-values and back, and what llama.cpp computes whatever the config says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from gemma2tool.containers.gguf import GGUFValue
from gemma2tool.errors import InputRefused
from gemma2tool.formats.gguf.key_values import KeyReader, KeyValue, boolean, f32, shortest_decimal, u32
from gemma2tool.formats.gguf.rope import (
    THETA,
    pattern_keys,
    read_layer_types,
    read_scaling,
    rope_keys,
    scaling_problem,
    unusual_rope_keys,
)
from gemma2tool.formats.gguf.stops import stop_ids
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.config_fields import SLIDING
from gemma2tool.model.names import HEAD
from gemma2tool.model.tensors import HEADS

T = TypeVar("T", int, float)

ARCHITECTURE = "gemma2"
LAYERS_OF_27B = 46
"""llama.cpp takes a Gemma 2 with this many layers for the 27B and scales its queries by D / H instead of head_dim."""

WINDOW = 4096
ATTENTION_SOFTCAP = 50.0
FINAL_SOFTCAP = 30.0


def shape_keys(config: Gemma2Config) -> list[KeyValue]:
    """The keys before ``general.file_type`` in the converter's order, then those that it leaves out of a Gemma 2.

    These are of the rotary embedding (see ``rope``) and of bidirectional attention.

    llama.cpp reads ``attention.causal`` of every architecture, Gemma 2's too (measured: logits within 3e-3 of the
    reference forward pass with the key, 6.0 off without it).
    """
    keys = [
        _key("context_length", u32, config.max_position_embeddings),
        _key("embedding_length", u32, config.hidden_size),
        _key("block_count", u32, config.num_hidden_layers),
        _key("feed_forward_length", u32, config.intermediate_size),
        _key("attention.head_count", u32, config.num_attention_heads),
        _key("attention.head_count_kv", u32, config.num_key_value_heads),
        _key("attention.layer_norm_rms_epsilon", f32, config.rms_norm_eps),
        _key("attention.key_length", u32, config.head_dim),
        _key("attention.value_length", u32, config.head_dim),
    ]
    keys += _rope_keys(config)
    if config.use_bidirectional_attention:
        keys.append((f"{ARCHITECTURE}.attention.causal", boolean(False)))
    return keys


def cap_keys(config: Gemma2Config) -> list[KeyValue]:
    """The keys after ``general.file_type``. A cap that the config does not have is left out; llama.cpp then applies its
    default.
    """
    keys = []
    if config.attn_logit_softcapping is not None:
        keys.append(_key("attn_logit_softcapping", f32, config.attn_logit_softcapping))
    if config.final_logit_softcapping is not None:
        keys.append(_key("final_logit_softcapping", f32, config.final_logit_softcapping))
    if config.sliding_window is not None:
        keys.append(_key("attention.sliding_window", u32, config.sliding_window))
    return [*keys, *pattern_keys(config)]


def _rope_keys(config: Gemma2Config) -> list[KeyValue]:
    try:
        return list(rope_keys(config))
    except OverflowError as error:
        raise InputRefused("gguf.range", f"config: a GGUF key of the rotary embedding: {error}") from None


def _key(name: str, make: Callable[[T], GGUFValue], value: T) -> KeyValue:
    try:
        return f"{ARCHITECTURE}.{name}", make(value)
    except OverflowError:
        raise InputRefused("gguf.range", f"config: the GGUF key of {name} cannot hold {value}") from None


def read_config(keys: KeyReader, embedding_rows: int, dtype: str) -> Gemma2Config:
    """The config with which llama.cpp runs the file: what GGUF does not store is what llama.cpp assumes.

    ``embedding_rows``: the vocabulary's size where the file has no tokens. ``dtype``: Hugging Face's name of the type
    that most weights are stored in. Raises ``InputRefused`` for missing or impossible keys.
    """
    layers = keys.integer("gemma2.block_count")
    hidden = keys.integer("gemma2.embedding_length")
    heads = keys.integer("gemma2.attention.head_count")
    head_dim = keys.integer("gemma2.attention.key_length", hidden // heads if heads > 0 else 0)
    tokens = keys.texts("tokenizer.ggml.tokens", None)
    stops = stop_ids(keys)
    causal = keys.flag("gemma2.attention.causal", True)
    return Gemma2Config(
        vocab_size=embedding_rows if tokens is None else len(tokens),
        hidden_size=hidden,
        intermediate_size=keys.integer("gemma2.feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys.integer("gemma2.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=keys.integer("gemma2.context_length", 8192),
        rms_norm_eps=shortest_decimal(keys.number("gemma2.attention.layer_norm_rms_epsilon")),
        query_pre_attn_scalar=_query_scalar(layers, hidden, heads, head_dim),
        layer_types=read_layer_types(keys, layers),
        rope_scaling=read_scaling(keys),
        rope_theta=shortest_decimal(keys.number("gemma2.rope.freq_base", THETA)),
        attn_logit_softcapping=shortest_decimal(keys.number("gemma2.attn_logit_softcapping", ATTENTION_SOFTCAP)),
        final_logit_softcapping=shortest_decimal(keys.number("gemma2.final_logit_softcapping", FINAL_SOFTCAP)),
        sliding_window=keys.integer("gemma2.attention.sliding_window", WINDOW),
        use_bidirectional_attention=None if causal else True,
        dtype=dtype,
        architectures=("Gemma2ForCausalLM",),
        bos_token_id=keys.integer("tokenizer.ggml.bos_token_id", 2),
        eos_token_id=stops[0] if len(stops) == 1 else stops,
        pad_token_id=keys.integer("tokenizer.ggml.padding_token_id", 0),
        extra={} if causal else {"is_causal": False},  # the key that transformers' default attention reads
    )


def _query_scalar(layers: int, hidden: int, heads: int, head_dim: int) -> int | float:
    """The query_pre_attn_scalar that llama.cpp uses."""
    if layers != LAYERS_OF_27B or heads <= 0:
        return head_dim
    return hidden // heads if hidden % heads == 0 else hidden / heads


def unusual_keys(config: Gemma2Config) -> list[str]:
    """Warnings on keys that llama.cpp reads although its converter never writes them: other readers may ignore them."""
    warnings = unusual_rope_keys(config)
    if config.use_bidirectional_attention:
        warnings.append(
            "use_bidirectional_attention is true: stored as gemma2.attention.causal false, which llama.cpp uses; a"
            " reader that ignores the key applies a causal mask, and llama.cpp's own converter leaves it out"
        )
    return warnings


def unrepresentable(config: Gemma2Config, tensors: Iterable[str]) -> list[str]:
    """What the config or the tensors have and GGUF cannot represent, each with what llama.cpp would compute instead."""
    reasons = []
    scalar = _query_scalar(config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.head_dim)
    if config.query_pre_attn_scalar != scalar:
        reasons.append(f"query_pre_attn_scalar is {config.query_pre_attn_scalar}; llama.cpp would use {scalar}")
    scaling = scaling_problem(config)
    if scaling is not None:
        reasons.append(scaling)
    if SLIDING not in config.layer_types:
        reasons.append("no layer slides; llama.cpp would use the sliding window in every even layer")
    for name, default in (("attn_logit_softcapping", ATTENTION_SOFTCAP), ("final_logit_softcapping", FINAL_SOFTCAP)):
        if getattr(config, name) is None:
            reasons.append(f"{name} is null; llama.cpp would cap at {default:g}")
    if config.hidden_activation not in ("gelu_pytorch_tanh", "gelu_new"):
        reasons.append(f"hidden_activation is {config.hidden_activation!r}; llama.cpp would use gelu_pytorch_tanh")
    names = set(tensors)
    if HEAD in names:
        reasons.append(f"{HEAD} is not tied; llama.cpp would use the embedding instead")
    reasons += [f"{name} is a classification head; a Gemma 2 GGUF has none" for name in HEADS if name in names][:1]
    if config.attention_bias:
        reasons.append("attention_bias is true; llama.cpp would leave the biases out")
    return reasons
