"""The built-in forward pass over several texts at once, at their last positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.verify.compare.top_bounds import log_softmax


def log_probabilities(
    checkpoint: Checkpoint, texts: Sequence[Sequence[int]], rows: Sequence[int], threads: int | None = None
) -> list[NDArray[np.float64]]:
    """For each text (token ids) the log-probabilities (rows, V) after its last ``rows`` tokens, in one pass."""
    import torch

    from gemma2tool.reference.streaming import StreamedForward, use_threads

    ids = np.zeros((len(texts), max(map(len, texts))), np.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text  # what follows a text does not reach it
    with use_threads(threads):
        run = StreamedForward(checkpoint, ids)
        x = None
        for x in run.hidden_states():  # noqa: B007  the last one is used
            pass
        assert x is not None
        ends = [
            x[index, len(text) - count : len(text)] for index, (text, count) in enumerate(zip(texts, rows, strict=True))
        ]
        last = torch.cat(ends)[None]
        logits = run.head_logits(last, last.shape[1])[0].float().cpu().numpy()
    return [log_softmax(part) for part in np.split(logits, np.cumsum(rows)[:-1])]
