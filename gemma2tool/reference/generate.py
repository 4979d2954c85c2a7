"""Generation, one token at a time over the key-value cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gemma2tool.errors import UsageError
from gemma2tool.reference.model import Gemma2ForCausalLM
from gemma2tool.reference.streaming import StreamedForCausalLM


@torch.no_grad()
def generate(
    model: Gemma2ForCausalLM | StreamedForCausalLM,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_ids: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yield the next token ids, int (B,), until each row has ended or ``max_new_tokens`` are out.

    ``input_ids`` (B, T), shorter rows padded on the left and masked in ``attention_mask``. ``temperature`` 0 takes the
    most likely token; else tokens are drawn from the ``top_k`` most likely, and of those from the smallest set that
    holds ``top_p`` of the probability. ``eos_token_ids``: by default the config's, all of them; the one that ends a row
    is yielded, and pad_token_id after it. Stops before max_position_embeddings would be passed. Same seed, same tokens.
    Raises ``UsageError`` for wrong sampling, ids outside the vocabulary, a prompt too long, or a bidirectional model.
    """
    config = model.config
    check_sampling(temperature, top_k, top_p)
    ends = torch.tensor(config.eos_token_ids if eos_token_ids is None else eos_token_ids, device=input_ids.device)
    generator = torch.Generator(device=input_ids.device).manual_seed(seed)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
    # Padding on the left must not move a prompt's tokens: positions count tokens, not slots.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    filler = 0 if config.pad_token_id is None else config.pad_token_id
    room = config.max_position_embeddings - int(positions.max())
    tokens, cache = input_ids, None
    for _ in range(min(max_new_tokens, max(room, 1))):  # a prompt without room is the model's to refuse
        output = model(
            tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        chosen = pick(output.logits[:, -1], temperature, top_k, top_p, generator)
        chosen = torch.where(ended, filler, chosen)
        yield chosen
        ended = ended | torch.isin(chosen, ends)
        if bool(ended.all()):
            return
        tokens = chosen[:, None]
        positions = positions[:, -1:] + 1
        mask = torch.cat((mask, torch.ones_like(tokens)), dim=1)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not temperature >= 0:
        raise UsageError("generate.temperature", f"temperature is {temperature}; it must be 0 or more")
    if top_k is not None and top_k < 1:
        raise UsageError("generate.top-k", f"top_k is {top_k}; it must be 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError("generate.top-p", f"top_p is {top_p}; it must be above 0 and at most 1")


def pick(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """Token ids (B,) from ``logits`` (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    kept = restrict(logits.float() / temperature, top_k, top_p)
    return torch.multinomial(kept.softmax(-1), 1, generator=generator).squeeze(-1)


def restrict(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """``logits`` (B, V) with -inf outside the ``top_k`` largest, then outside the smallest set holding ``top_p``."""
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        likelihood = ordered.softmax(-1)
        # Kept while the more likely ones hold less than top_p; so the most likely token always is.
        beyond = likelihood.cumsum(-1) - likelihood >= top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logits
