"""Checks of a forward pass's inputs, before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2tool.errors import UsageError
from gemma2tool.model.config import Gemma2Config


def check_ids(input_ids: Tensor, config: Gemma2Config) -> Tensor:
    """``input_ids`` as int64 (B, T); raises ``UsageError`` for another shape or dtype, no tokens, or ids outside the
    vocabulary."""
    integers = not (input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool)
    if input_ids.dim() != 2 or input_ids.numel() == 0 or not integers:
        raise UsageError(
            "forward.ids",
            f"input_ids must be integers of shape (B, T), found {input_ids.dtype} {tuple(input_ids.shape)}",
        )
    input_ids = input_ids.long()
    outside = (input_ids < 0) | (input_ids >= config.vocab_size)
    if bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        raise UsageError(
            "forward.vocabulary",
            f"token id {int(input_ids[row, column])} at position {column} of prompt {row} is outside the"
            f" vocabulary of {config.vocab_size}",
            hint="use the tokenizer that belongs to this checkpoint",
        )
    return input_ids


def check_embeds(inputs_embeds: Tensor, config: Gemma2Config) -> Tensor:
    """``inputs_embeds``; raises ``UsageError`` for a shape other than (B, T, D), or no tokens."""
    if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != config.hidden_size or inputs_embeds.numel() == 0:
        raise UsageError(
            "forward.embeds",
            f"inputs_embeds must have shape (B, T, {config.hidden_size}), found {tuple(inputs_embeds.shape)}",
        )
    return inputs_embeds


def check_mask(attention_mask: Tensor | None, batch: int, total: int, device: torch.device) -> Tensor | None:
    """``attention_mask`` as bool (B, past + T), None where nothing is padded; raises ``UsageError`` for another
    shape."""
    if attention_mask is None:
        return None
    if tuple(attention_mask.shape) != (batch, total):
        raise UsageError(
            "forward.mask",
            f"attention_mask has shape {tuple(attention_mask.shape)}; it must be {(batch, total)}: one entry per token,"
            " including those in the cache",
        )
    mask = attention_mask.to(device).bool()
    return None if bool(mask.all()) else mask


def check_positions(
    position_ids: Tensor | None,
    cache_position: Tensor | None,
    past: int,
    batch: int,
    length: int,
    config: Gemma2Config,
    device: torch.device,
) -> Tensor:
    """Positions (B or 1, T); by default they continue those in the cache.

    ``cache_position`` (T,), documented until transformers 4, must be the slots that follow the cache. Raises
    ``UsageError`` for other values or shapes, and for positions outside the model's range.
    """
    slots = torch.arange(past, past + length, device=device)
    if cache_position is not None and not torch.equal(cache_position.to(device).long().flatten(), slots):
        raise UsageError(
            "forward.cache-position",
            f"cache_position must be {past} to {past + length - 1}, the slots that follow the {past} in the cache",
        )
    positions = slots if position_ids is None else position_ids.to(device)
    if positions.dim() == 1:
        positions = positions.unsqueeze(0)
    if tuple(positions.shape) not in ((1, length), (batch, length)):
        raise UsageError(
            "forward.positions",
            f"position_ids has shape {tuple(positions.shape)}; it must be {(batch, length)} or {(1, length)}",
        )
    limit = _longest(config)
    if int(positions.max()) >= limit or int(positions.min()) < 0:
        raise UsageError(
            "forward.too-long",
            f"positions run from {int(positions.min())} to {int(positions.max())}; this model has"
            f" max_position_embeddings {limit}",
            hint="shorten the prompt",
        )
    return positions


def refuse_packed(positions: Tensor) -> None:
    """Raises ``UsageError`` for positions (B or 1, T) that do not increase by one from token to token.

    Without a mask and a cache, transformers 5 takes each run for a sequence of its own; transformers 4 does not.
    """
    steps = positions.diff(dim=-1)
    if bool((steps != 1).any()):
        row, column = (steps != 1).nonzero()[0].tolist()
        raise UsageError(
            "forward.packed",
            f"position_ids continue with {int(positions[row, column + 1])} after {int(positions[row, column])}: several"
            " sequences in one row",
            hint="give each sequence a row of its own, padded and with an attention_mask",
        )


def _longest(config: Gemma2Config) -> int:
    """max_position_embeddings; times the factor where the rotary scaling leaves that field at the trained length."""
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "dynamic":
        return int(config.max_position_embeddings * scaling["factor"])
    return config.max_position_embeddings
