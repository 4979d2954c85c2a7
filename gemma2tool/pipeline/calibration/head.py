"""The inputs of the output head: what the embedding, where it is tied, is multiplied with at the end; and what it makes
of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.devices import current_device, on_device
from gemma2tool.pipeline.calibration.layer import SEQUENCES, refuse_nonfinite
from gemma2tool.pipeline.calibration.weights import Weights
from gemma2tool.pipeline.ranks.together import ALONE, Ranks
from gemma2tool.quantizers.calibration import Map
from gemma2tool.quantizers.calibration.hessian import Hessian, NewHessian
from gemma2tool.reference.layers import RMSNorm, soft_cap
from gemma2tool.reference.tensors import load_tensor

POSITIONS = 128
"""Positions whose logits are held at once."""

MAX_LOSS = 100.0
"""Of a token, in nats: more is the same, and would overflow."""


def final_norm(checkpoint: Checkpoint) -> RMSNorm:
    """The norm before the head."""
    with torch.device("meta"):
        norm = RMSNorm(checkpoint.config.hidden_size, checkpoint.config.rms_norm_eps)
    weight = load_tensor(checkpoint.tensors["model.norm.weight"], torch.float32, current_device())
    norm.weight = nn.Parameter(weight, requires_grad=False)
    return norm


def head_hessian(
    checkpoint: Checkpoint,
    residual: list[Tensor],
    block: int | None,
    run: Map,
    ranks: Ranks = ALONE,
    new_hessian: NewHessian = Hessian,
) -> Hessian:
    """The Hessian (D, D) of the final normed hidden states; ``residual``: (1, T, D) after the last layer, for each
    sequence.
    """
    norm = final_norm(checkpoint)
    hessian = new_hessian(checkpoint.config.hidden_size, block, device=current_device(), share=ranks.share)
    for first in range(0, len(residual), SEQUENCES):
        batch = run(lambda x: norm(on_device(x)), residual[first : first + SEQUENCES])
        hessian.add(torch.cat([sequence.flatten(0, 1) for sequence in batch]), run)
    ranks.complete(hessian)
    refuse_nonfinite(hessian, "inputs of the head")
    return hessian


def perplexity(checkpoint: Checkpoint, residual: Sequence[Tensor], ids: NDArray[np.int64]) -> float:
    """Of sequences ``ids`` (n, T); ``residual``: (1, T, D) after the last layer, for each."""
    norm, weights, loss = final_norm(checkpoint), Weights(current_device()), 0.0
    head, cap = checkpoint.tensors[checkpoint.config.head_name], checkpoint.config.final_logit_softcapping
    for x, row in zip(residual, ids, strict=True):
        following = torch.from_numpy(row[1:])[:, None]
        hidden = norm(on_device(x))[0, :-1]
        for first in range(0, len(hidden), POSITIONS):
            logits = soft_cap(weights.times(hidden[first : first + POSITIONS], head), cap)
            tokens = following[first : first + POSITIONS].to(logits.device)
            loss -= float(logits.log_softmax(-1).gather(1, tokens).sum())
    return math.exp(min(loss / max(ids[:, 1:].size, 1), MAX_LOSS))
