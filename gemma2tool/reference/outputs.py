"""What the model classes return; the names are those of transformers' outputs."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from gemma2tool.reference.cache import KeyValueCache


@dataclass
class Output:
    """Shared by all outputs: fields that were not asked for are None."""

    def to_tuple(self) -> tuple:
        """The fields that are there, in order."""
        return tuple(value for field in fields(self) if (value := getattr(self, field.name)) is not None)


@dataclass
class ModelOutput(Output):
    """``last_hidden_state`` (B, T, D) after the final norm; ``hidden_states``: L + 1 of (B, T, D), the scaled
    embeddings first
    and the final norm's output last; ``attentions``: L of (B, H, T, S)."""

    last_hidden_state: Tensor
    past_key_values: KeyValueCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutput(Output):
    """``logits`` (B, kept positions, V), soft-capped; ``loss`` when labels were given."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KeyValueCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutput(Output):
    """``logits`` (B, num_labels), of each row's last token that is no padding."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KeyValueCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class TokenClassifierOutput(Output):
    """``logits`` (B, T, num_labels)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
