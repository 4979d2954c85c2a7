"""The KL divergence between a source and a candidate, by windows of a text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.progress import Advance
from gemma2tool.pipeline.sensitivity.head import EMBEDDING, HEAD, divergence
from gemma2tool.pipeline.sensitivity.layer import WINDOWS
from gemma2tool.reference.streaming import StreamedForward

BOOTSTRAP_DRAWS = 4000


def window_divergence(
    source: Checkpoint, candidate: Checkpoint, ids: NDArray[np.int64], advance: Advance | None = None
) -> NDArray[np.float64]:
    """Mean KL(source || candidate), in nats, over the positions of each window of token ids (N, T): (N,)."""
    tensor = candidate.tensors[EMBEDDING if candidate.config.tie_word_embeddings else HEAD]

    def head(first: int, last: int) -> torch.Tensor:
        return torch.from_numpy(tensor.load_rows_f32(first, last))

    means = []
    for batch in _batches(ids):
        a, b = (StreamedForward(side, batch).last_hidden_state().flatten(0, 1) for side in (source, candidate))
        means.append(divergence(source, a, b, head).view(len(batch), -1).mean(1).numpy())
        if advance is not None:
            advance(batch.size, "windows")
    return np.concatenate(means)


def bootstrap_interval(kl: NDArray[np.float64], weights: NDArray[np.float64] | None = None) -> tuple[float, float]:
    """The 95 % interval of the mean of windows (N,), from windows drawn with replacement; ``weights``: their tokens."""
    drawn = np.random.default_rng(0).integers(0, len(kl), (BOOTSTRAP_DRAWS, len(kl)))
    weights = np.ones(len(kl)) if weights is None else weights
    means = (kl * weights)[drawn].sum(1) / weights[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _batches(ids: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for first in range(0, len(ids), WINDOWS):
        yield ids[first : first + WINDOWS]
