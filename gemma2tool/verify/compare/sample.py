"""The same beginning of a text, continued by source and candidate."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.devices import current_device
from gemma2tool.model.progress import Advance
from gemma2tool.reference.generate import generate
from gemma2tool.reference.streaming import StreamedForCausalLM, use_threads
from gemma2tool.verify.compare.measurements import Sample
from gemma2tool.verify.compare.token_ids import TokenIds
from gemma2tool.verify.compare.tokenizer import text_pieces

PROMPT_TOKENS = 32
"""Tokens of the prompt that are continued."""


def continue_prompt(
    source: Checkpoint, candidate: Checkpoint, ids: TokenIds, count: int, *, threads: int, advance: Advance
) -> Sample:
    """Let both sides continue the first tokens of the first prompt of ``ids`` (B, T) by ``count`` tokens, greedily.

    The weights are read again for every token, so that memory does not grow with the model. ``advance`` is called once
    a token.
    """
    prompt = ids[:1, : min(PROMPT_TOKENS, max(ids.shape[1] // 2, 1))]

    def pieces(tokens: list[int]) -> tuple[str, ...]:
        texts = text_pieces(source, np.array([tokens]))
        return tuple(f"<{token}>" for token in tokens) if texts is None else texts[0]

    def tokens_of(checkpoint: Checkpoint) -> Iterator[int]:
        device = current_device()
        model = StreamedForCausalLM(checkpoint, device=device)
        for token in generate(model, torch.as_tensor(prompt, device=device), max_new_tokens=count):
            advance(1, "")
            yield int(token)

    with use_threads(threads):
        continuations = [pieces(list(tokens_of(side))) for side in (source, candidate)]
    return Sample(pieces(prompt[0].tolist()), *continuations)
