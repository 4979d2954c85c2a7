"""The KL divergence between a source and a candidate, by windows of a text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemma2tool.errors import InputRefused
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.verify.compare.logits import LogitOptions, compare_logits

_SHAPE = ("vocab_size", "num_hidden_layers", "hidden_size")


def window_divergence(
    source: Checkpoint, candidate: Checkpoint, ids: NDArray[np.int64], *, threads: int | None = None
) -> NDArray[np.float64]:
    """Mean KL(source || candidate), in nats, over the positions of each window of token ids (N, T): (N,).

    Raises ``InputRefused`` (``sensitivity.nonfinite``) where one of them computes values that are not finite.
    """
    options = LogitOptions(text=True, probe=False)
    metrics = compare_logits(source, candidate, ids, options, threads=threads).metrics
    for side, count in zip((source, candidate), metrics.nonfinite, strict=True):
        if count:
            message = f"{side.path}: {count:,} logits are NaN or infinite"
            raise InputRefused("sensitivity.nonfinite", message)
    kl: NDArray[np.float64] = metrics.kl.reshape(ids.shape).mean(1)
    return kl


def check_comparable(source: Checkpoint, candidate: Checkpoint) -> None:
    """Raises ``InputRefused`` (``quality.other-model``) for a candidate whose logits or layers have no counterpart."""
    for name in _SHAPE:
        a, b = (getattr(side.config, name) for side in (source, candidate))
        if a != b:
            message = f"{candidate.path}: {name} is {b}, and {a} in {source.path}"
            raise InputRefused("quality.other-model", message)
