"""Generation, one token at a time, with the key-value cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma2tool.errors import UsageError
from gemma2tool.reference.model import Gemma2ForCausalLM
from gemma2tool.reference.streaming import StreamedForCausalLM


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    ``temperature``: 0 takes the most likely token. ``top_k``: draw from this many most likely tokens. ``top_p``: then
    from the smallest set of tokens whose probability is at least this. ``seed``: equal seeds give equal tokens. Raises
    ``UsageError`` for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UsageError("generate.temperature", f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError("generate.top-k", f"top_k is {self.top_k}; it must be 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError("generate.top-p", f"top_p is {self.top_p}; it must be above 0 and at most 1")


GREEDY = Sampling()


@torch.no_grad()
def generate(
    model: Gemma2ForCausalLM | StreamedForCausalLM,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling = GREEDY,
    eos_token_ids: tuple[int, ...] | None = None,
) -> Iterator[Tensor]:
    """Yield the next token ids, int (B,), until each row has ended or ``max_new_tokens`` have been generated.

    ``input_ids`` (B, T): shorter rows are padded on the left and masked in ``attention_mask``. ``eos_token_ids``: all
    of the config's by default; the one that ends a row is yielded, and pad_token_id after it. Stops at
    max_position_embeddings. Raises ``UsageError`` for ids outside the vocabulary, a prompt that is too long, or a
    bidirectional model.
    """
    config = model.config
    ends = torch.tensor(config.eos_token_ids if eos_token_ids is None else eos_token_ids, device=input_ids.device)
    generator = torch.Generator(device=input_ids.device).manual_seed(sampling.seed)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
    # Padding on the left must not shift a prompt's positions: they count tokens, not slots.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    padding = 0 if config.pad_token_id is None else config.pad_token_id
    room = config.max_position_embeddings - int(positions.max())
    tokens, cache = input_ids, None
    for _ in range(min(max_new_tokens, max(room, 1))):  # the model refuses a prompt that is too long
        output = model(
            tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        chosen = sample_tokens(output.logits[:, -1], sampling, generator)
        chosen = torch.where(ended, padding, chosen)
        yield chosen
        ended = ended | torch.isin(chosen, ends)
        if bool(ended.all()):
            return
        tokens = chosen[:, None]
        positions = positions[:, -1:] + 1
        mask = torch.cat((mask, torch.ones_like(tokens)), dim=1)


def sample_tokens(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw token ids (B,) from ``logits`` (B, V)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    restricted = restrict_logits(logits.float() / sampling.temperature, sampling.top_k, sampling.top_p)
    return torch.multinomial(restricted.softmax(-1), 1, generator=generator).squeeze(-1)


def restrict_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """``logits`` (B, V) with -inf outside the ``top_k`` largest, then outside the smallest set with probability
    ``top_p``."""
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        sorted_logits, order = logits.sort(dim=-1, descending=True)
        probability = sorted_logits.softmax(-1)
        # A token stays if the more likely tokens have less than top_p; so the most likely token always stays.
        dropped = probability.cumsum(-1) - probability >= top_p
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    return logits
