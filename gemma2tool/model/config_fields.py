"""The fields of a Gemma 2 config, each once: what a different value changes, and how values of different formats
compare.

Every rule that goes by a list of fields takes it from here: the config gate and the diagnosis of differing configs, the
config digest, and the comparison with the released models. The lists differ on purpose:

- The digest covers the fields with effect ``ARITHMETIC``. Receipts hold digests, so the set is part of the digest's
  definition (version 1) and cannot change within it.
- ``max_position_embeddings`` is not among them although three kinds of rotary scaling (dynamic, yarn, longrope) compute
  with it: the digest was defined without it. The config gate judges it by itself.
- The comparison with a released model leaves out the sizes by which the model was recognized, and the three fields that
  models derived from a release set deliberately (biases, an untied output matrix, bidirectional attention).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from ctypes import c_float
from dataclasses import dataclass
from typing import Any

from gemma2tool.model.rope_scaling import comparable_scaling

SLIDING = "sliding_attention"
FULL = "full_attention"


class Effect(enum.Enum):
    """What a different value of a field changes."""

    ARITHMETIC = "arithmetic"
    """Some logit of some prompt. Part of the config digest."""

    USE = "use"
    """How the model is fed, stopped or sampled; not what it computes for given token ids, but for the exception
    above."""

    DESCRIPTION = "description"
    """Nothing: the field describes the file, the training, or labels."""


class Release(enum.Enum):
    """What a field is for when a config is compared with the released models."""

    IDENTIFIES = "identifies"
    """The released size is recognized by it."""

    COMPARED = "compared"
    """A value other than the released one is worth a warning."""

    IGNORED = "ignored"


@dataclass(frozen=True)
class ConfigField:
    """A field of ``Gemma2Config``.

    ``meaning``: what the field is, as a noun phrase or clause for messages. ``kept_in_float32``: some formats (GGUF)
    store the number in float32, so values that are equal in float32 are equal.
    """

    name: str
    effect: Effect
    meaning: str = ""
    release: Release = Release.IGNORED
    kept_in_float32: bool = False


CONFIG_FIELDS: Mapping[str, ConfigField] = {
    field.name: field
    for field in (
        ConfigField("vocab_size", Effect.ARITHMETIC, "rows of the embedding", Release.COMPARED),
        ConfigField("hidden_size", Effect.ARITHMETIC, "width of the residual stream", Release.IDENTIFIES),
        ConfigField("intermediate_size", Effect.ARITHMETIC, "width of the feed-forward layer", Release.IDENTIFIES),
        ConfigField("num_hidden_layers", Effect.ARITHMETIC, "decoder layers", Release.IDENTIFIES),
        ConfigField("num_attention_heads", Effect.ARITHMETIC, "query heads", Release.IDENTIFIES),
        ConfigField("num_key_value_heads", Effect.ARITHMETIC, "key-value heads", Release.IDENTIFIES),
        ConfigField("head_dim", Effect.ARITHMETIC, "width of a head", Release.IDENTIFIES),
        ConfigField("hidden_activation", Effect.ARITHMETIC, "activation of the gate", Release.COMPARED),
        ConfigField(
            "rms_norm_eps",
            Effect.ARITHMETIC,
            "added to the mean square in every norm",
            Release.COMPARED,
            kept_in_float32=True,
        ),
        ConfigField(
            "query_pre_attn_scalar",
            Effect.ARITHMETIC,
            "attention scores are divided by its square root",
            Release.COMPARED,
        ),
        ConfigField(
            "attn_logit_softcapping",
            Effect.ARITHMETIC,
            "cap of the attention scores",
            Release.COMPARED,
            kept_in_float32=True,
        ),
        ConfigField(
            "final_logit_softcapping", Effect.ARITHMETIC, "cap of the logits", Release.COMPARED, kept_in_float32=True
        ),
        ConfigField(
            "rope_theta", Effect.ARITHMETIC, "base of the rotary embedding", Release.COMPARED, kept_in_float32=True
        ),
        ConfigField("rope_scaling", Effect.ARITHMETIC, "scaling of the rotary embedding", Release.COMPARED),
        ConfigField("sliding_window", Effect.ARITHMETIC, "keys that a sliding layer sees", Release.COMPARED),
        ConfigField("layer_types", Effect.ARITHMETIC, "which layers slide", Release.COMPARED),
        ConfigField("use_bidirectional_attention", Effect.ARITHMETIC, "whether later tokens are seen"),
        ConfigField("attention_bias", Effect.ARITHMETIC, "biases in the attention projections"),
        ConfigField("tie_word_embeddings", Effect.ARITHMETIC, "whether the embedding is the output matrix"),
        ConfigField("bos_token_id", Effect.USE, "every text starts with it"),
        ConfigField("eos_token_id", Effect.USE, "generation stops at it"),
        ConfigField("pad_token_id", Effect.USE, "fills short sequences of a batch"),
        ConfigField(
            "max_position_embeddings", Effect.USE, "the longest sequence the model was made for", Release.COMPARED
        ),
        ConfigField("dtype", Effect.DESCRIPTION),
        ConfigField("architectures", Effect.DESCRIPTION),
        ConfigField("transformers_version", Effect.DESCRIPTION),
        ConfigField("initializer_range", Effect.DESCRIPTION),
        ConfigField("attention_dropout", Effect.DESCRIPTION),
        ConfigField("use_cache", Effect.DESCRIPTION),
        ConfigField("id2label", Effect.DESCRIPTION),
        ConfigField("label2id", Effect.DESCRIPTION),
        ConfigField("problem_type", Effect.DESCRIPTION),
        ConfigField("extra", Effect.DESCRIPTION),
    )
}
"""Every field of ``Gemma2Config`` but ``notes``, which is not part of the model."""


def fields_with(effect: Effect) -> tuple[ConfigField, ...]:
    """The fields that have this effect, in the order of the table."""
    return tuple(field for field in CONFIG_FIELDS.values() if field.effect is effect)


ARITHMETIC_FIELDS = fields_with(Effect.ARITHMETIC)
USE_FIELDS = fields_with(Effect.USE)
DESCRIPTION_FIELDS = fields_with(Effect.DESCRIPTION)

IDENTIFYING_FIELDS = tuple(name for name, field in CONFIG_FIELDS.items() if field.release is Release.IDENTIFIES)
RELEASE_COMPARED_FIELDS = tuple(name for name, field in CONFIG_FIELDS.items() if field.release is Release.COMPARED)


def comparable_value(name: str, value: Any) -> Any:
    """A field's value in the form in which values of different formats compare: equal results mean the same
    arithmetic."""
    field = CONFIG_FIELDS[name]
    if field.kept_in_float32 and value is not None:
        return c_float(value).value  # rounded to float32, without importing numpy
    if name == "use_bidirectional_attention":
        return bool(value)
    if name == "rope_scaling":  # one scaling has several spellings
        return comparable_scaling(value or {})
    return value
