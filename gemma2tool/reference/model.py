"""``Gemma2Model`` and its three heads, with the inputs and outputs of Hugging Face's classes.

Weights have canonical names, so ``load_state_dict`` takes a Hugging Face state dict unchanged. All forward passes take

- ``input_ids`` int (B, T), or instead ``inputs_embeds`` (B, T, D) (already scaled, as in transformers 5);
- ``attention_mask`` (B, tokens in the cache + T): 0 for padding, on either side;
- ``position_ids`` (B, T) or (T,): by default they continue those in the cache, padding included;
- ``past_key_values``: the ``KeyValueCache`` of an earlier call; ``use_cache``: return one (default: the config's);
- ``output_hidden_states``, ``output_attentions``; ``return_dict``: False for a plain tuple;
- ``cache_position`` (T,): documented until transformers 4, where it had to be the slots that follow the cache.

Wrong inputs raise ``UsageError`` with an id ``forward.*``.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma2tool.errors import UsageError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.reference.cache import KeyValueCache, choose_cache
from gemma2tool.reference.inputs import check_embeds, check_ids, check_mask, check_positions, refuse_packed
from gemma2tool.reference.layers import DecoderLayer, Linear, RMSNorm, soft_cap
from gemma2tool.reference.loss_functions import causal_lm_loss, sequence_loss, token_loss
from gemma2tool.reference.outputs import (
    CausalLMOutput,
    ModelOutput,
    OutputTuple,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from gemma2tool.reference.rotary import cos_sin
from gemma2tool.reference.tensors import load_tensor


def scale_embeddings(x: Tensor, config: Gemma2Config) -> Tensor:
    """x (..., D) times sqrt(D), which is first rounded to the dtype of x (2B: 48; 9B in bfloat16: 59.75; 27B: 68)."""
    return x * torch.tensor(config.embed_scale, dtype=x.dtype, device=x.device)


class Embedding(nn.Module):
    """Rows of ``weight`` (V, D), unscaled."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self.weight)


class Gemma2PreTrainedModel(nn.Module):
    """The base of the four classes: construction from a config (randomly initialized) or from a checkpoint."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Self:
        """The whole model in memory, with weights converted to ``dtype`` a few rows at a time; gradients off, eval
        mode."""
        with torch.device("meta"):
            model = cls(checkpoint.config)
        missing = [name for name in model.state_dict() if model.canonical_name(name) not in checkpoint.tensors]
        if missing:
            raise UsageError(
                "forward.missing-tensor", f"{cls.__name__} needs {missing[0]}, which the checkpoint does not have"
            )
        tensors = {name: checkpoint.tensors[model.canonical_name(name)] for name in model.state_dict()}
        state = {name: load_tensor(tensor, dtype, device) for name, tensor in tensors.items()}
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(False).eval()

    @staticmethod
    def canonical_name(name: str) -> str:
        """The canonical name of this class's weight ``name``."""
        return name

    @torch.no_grad()
    def initialize(self, seed: int = 0) -> Self:
        """Set new weights: matrices normal with the config's initializer_range; norms, biases and the padding token's
        row zero."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.zero_()
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)
            if name.endswith("embed_tokens.weight") and self.config.pad_token_id in range(len(parameter)):
                parameter[self.config.pad_token_id] = 0
        return self


class Gemma2Model(Gemma2PreTrainedModel):
    """Embedding, decoder layers and final norm, without a head."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__(config)
        self.embed_tokens = Embedding(config)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @staticmethod
    def canonical_name(name: str) -> str:
        return f"model.{name}"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        cache_position: Tensor | None = None,
    ) -> ModelOutput | OutputTuple:
        config = self.config
        if input_ids is not None and inputs_embeds is None:
            x = scale_embeddings(self.embed_tokens(check_ids(input_ids, config)), config)
        elif inputs_embeds is not None and input_ids is None:
            x = check_embeds(inputs_embeds, config)
        else:
            raise UsageError("forward.inputs", "exactly one of input_ids and inputs_embeds is required")
        batch, length = x.shape[:2]
        cache = choose_cache(config, past_key_values, use_cache)
        past = cache.get_seq_length() if cache is not None else 0
        mask = check_mask(attention_mask, batch, past + length, x.device)
        positions = check_positions(position_ids, cache_position, past, batch, length, config, x.device)
        if cache is None and attention_mask is None and not config.use_bidirectional_attention:
            refuse_packed(positions)
        cos, sin = cos_sin(config, positions, x.dtype)

        hidden_states, attentions = [x], []
        for layer in self.layers:
            x, weights = layer(x, cos, sin, mask, cache, output_attentions)
            if output_hidden_states:
                hidden_states.append(x)
            if output_attentions:
                attentions.append(weights)
        x = self.norm(x)
        output = ModelOutput(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*hidden_states[:-1], x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()


class Gemma2ForCausalLM(Gemma2PreTrainedModel):
    """Logits for the next token at each position."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__(config)
        self.model = Gemma2Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *args: Any,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutput | OutputTuple:
        """``labels`` (B, T): token ids, -100 ignored; position t is compared with label t + 1.

        ``logits_to_keep``: the last n positions (0: all), or a tensor of positions (n,) or (B, n), or a bool mask
        (B, T), whose logits then come as (chosen, V).
        """
        base = self.model(input_ids, *args, **kwargs)
        hidden = keep_positions(base.last_hidden_state, logits_to_keep)
        tied = self.config.tie_word_embeddings
        head = self.model.embed_tokens.weight if tied else self.lm_head.weight
        logits = soft_cap(F.linear(hidden, head), self.config.final_logit_softcapping)
        loss = None if labels is None else causal_lm_loss(logits, labels)
        output = CausalLMOutput(loss, logits, base.past_key_values, base.hidden_states, base.attentions)
        return output if return_dict else output.to_tuple()


class Gemma2ForSequenceClassification(Gemma2PreTrainedModel):
    """One label, several labels, or numbers for each sequence, from its last token that is not padding."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__(config)
        self.model = Gemma2Model(config)
        self.score = Linear(config.hidden_size, config.num_labels, bias=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *args: Any,
        labels: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | OutputTuple:
        """``labels``: (B,) class numbers, (B, num_labels) floats for several labels, or (B,) or (B, num_labels) targets
        of a regression. The config's problem_type decides; without one, the number of labels and the dtype of
        ``labels``.

        The last token is found by ``pad_token_id``, as in transformers, not by the mask; with ``inputs_embeds`` it is
        the last position.
        """
        base = self.model(input_ids, *args, **kwargs)
        batch = base.last_hidden_state.shape[0]
        pad = self.config.pad_token_id
        if pad is None and batch > 1:
            raise UsageError("forward.no-padding-token", "more than one sequence requires a pad_token_id in the config")
        last = base.last_hidden_state.new_full((batch,), base.last_hidden_state.shape[1] - 1, dtype=torch.long)
        if pad is not None and input_ids is not None:
            slots = torch.arange(input_ids.shape[1], device=input_ids.device)
            last = torch.where(input_ids != pad, slots, 0).max(dim=1).values
        logits = self.score(base.last_hidden_state[torch.arange(batch, device=last.device), last])
        loss = None if labels is None else sequence_loss(logits, labels, self.config)
        output = SequenceClassifierOutput(loss, logits, base.past_key_values, base.hidden_states, base.attentions)
        return output if return_dict else output.to_tuple()


class Gemma2ForTokenClassification(Gemma2PreTrainedModel):
    """A label for each token."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__(config)
        self.model = Gemma2Model(config)
        self.score = Linear(config.hidden_size, config.num_labels, bias=True)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *args: Any,
        labels: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> TokenClassifierOutput | OutputTuple:
        """``labels`` (B, T): class numbers, -100 ignored. There is no dropout before the head."""
        base = self.model(input_ids, *args, **kwargs)
        logits = self.score(base.last_hidden_state)
        loss = None if labels is None else token_loss(logits, labels)
        output = TokenClassifierOutput(loss, logits, base.hidden_states, base.attentions)
        return output if return_dict else output.to_tuple()


def keep_positions(hidden: Tensor, positions: int | Tensor) -> Tensor:
    """The rows of ``hidden`` (B, T, D) whose logits are kept; see ``Gemma2ForCausalLM.forward``."""
    if isinstance(positions, int):
        return hidden[:, -positions:] if positions else hidden
    if positions.dim() == 2:
        if positions.dtype == torch.bool:
            return hidden[positions]
        return torch.take_along_dim(hidden, positions[..., None], dim=1)
    return hidden[:, positions]
