"""The training losses of the heads, as transformers defines them; a label of -100 is ignored."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma2tool.errors import UsageError
from gemma2tool.model.config import Gemma2Config

IGNORED = -100


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in float32 of logits (B, T, V) at position t against ``labels`` (B, T) at t + 1."""
    _check(labels, logits.shape[:-1], logits.shape[-1])
    return _cross_entropy(logits[:, :-1], labels[:, 1:])


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, T, N) against ``labels`` (B, T)."""
    _check(labels, logits.shape[:-1], logits.shape[-1])
    return _cross_entropy(logits, labels)


def sequence_loss(logits: Tensor, labels: Tensor, config: Gemma2Config) -> Tensor:
    """Loss of logits (B, N): mean squared error, cross-entropy or, for several labels at once, binary cross-entropy."""
    count = logits.shape[-1]
    kind = config.problem_type or (
        "regression"
        if count == 1
        else "multi_label_classification"
        if labels.is_floating_point()
        else "single_label_classification"
    )
    labels = labels.to(logits.device)
    if kind == "single_label_classification":
        _check(labels, logits.shape[:1], count)
        return _cross_entropy(logits, labels)
    if kind == "regression" and count == 1:
        logits, labels = logits.flatten(), labels.flatten()
    if labels.shape != logits.shape:
        raise UsageError(
            "forward.labels", f"labels have shape {tuple(labels.shape)}; {kind} needs {tuple(logits.shape)}"
        )
    if kind == "regression":
        return F.mse_loss(logits, labels.to(logits.dtype))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, -2), labels.to(logits.device).long().flatten(), ignore_index=IGNORED)


def _check(labels: Tensor, shape: torch.Size, classes: int) -> None:
    if labels.shape != shape:
        raise UsageError("forward.labels", f"labels have shape {tuple(labels.shape)}; they must be {tuple(shape)}")
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORED)]
    if len(wrong):
        raise UsageError(
            "forward.labels", f"label {int(wrong[0])} is neither {IGNORED} nor one of the {classes} classes"
        )
