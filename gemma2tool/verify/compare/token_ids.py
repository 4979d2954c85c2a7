"""Token ids to run both models on: the caller's, and the default prompt of pseudo-random tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemma2tool.errors import UsageError
from gemma2tool.model.config import Gemma2Config

TokenIds = NDArray[np.int64]

DEFAULT_TOKENS = 64


def default_ids(config: Gemma2Config, tokens: int = DEFAULT_TOKENS) -> TokenIds:
    """A prompt that is the same on every machine, (1, ``tokens``): bos, then pseudo-random ids of the whole vocabulary.

    The generator is splitmix64.
    """
    tokens = min(tokens, config.max_position_embeddings)
    mask, ids = 2**64 - 1, []
    for index in range(1, tokens + 1):
        state = index * 0x9E3779B97F4A7C15 & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        ids.append((state ^ state >> 31) % config.vocab_size)
    if config.bos_token_id is not None and ids:
        ids[0] = config.bos_token_id
    return np.array([ids], np.int64)


def as_prompts(ids: ArrayLike) -> TokenIds:
    """Token ids (T,) or (B, T) as (B, T). Raises ``UsageError`` for anything else."""
    array: NDArray[Any] = np.asarray(ids)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or not array.size or array.dtype.kind not in "iu":
        raise UsageError(
            "ids.shape",
            f"token ids are {array.dtype} of shape {array.shape}; integers of shape (T,) or (B, T) are needed",
        )
    return array.astype(np.int64)
