"""The outputs of the model classes, with the names of transformers' outputs."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from gemma2tool.reference.cache import KeyValueCache

OutputTuple = tuple[Tensor | KeyValueCache | tuple[Tensor, ...], ...]
"""An output as a plain tuple, for ``return_dict=False``."""


@dataclass
class Output:
    """The base of all outputs. Fields that were not requested are None."""

    def to_tuple(self) -> OutputTuple:
        """The fields that are not None, in order."""
        return tuple(value for field in fields(self) if (value := getattr(self, field.name)) is not None)


@dataclass
class ModelOutput(Output):
    """``last_hidden_state``: (B, T, D) after the final norm. ``hidden_states``: L + 1 of (B, T, D), from the scaled
    embeddings to the output of the final norm. ``attentions``: L of (B, H, T, S)."""

    last_hidden_state: Tensor
    past_key_values: KeyValueCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutput(Output):
    """``logits``: (B, kept positions, V), soft-capped. ``loss``: where labels were given."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: KeyValueCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutput(Output):
    """``logits``: (B, num_labels), of each row's last token that is not padding."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: KeyValueCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class TokenClassifierOutput(Output):
    """``logits``: (B, T, num_labels)."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
