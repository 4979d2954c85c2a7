"""The inputs of the output head: what the embedding, where it is tied, is multiplied with at the end."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.devices import current_device, on_device
from gemma2tool.pipeline.calibration.layer import SEQUENCES, refuse_nonfinite
from gemma2tool.pipeline.ranks.together import ALONE, Ranks
from gemma2tool.quantizers.calibration import Map
from gemma2tool.quantizers.calibration.hessian import Hessian, NewHessian
from gemma2tool.reference.layers import RMSNorm
from gemma2tool.reference.tensors import load_tensor


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
