"""The output matrix beside the embedding: one matrix, or two with equal values."""

from __future__ import annotations

from dataclasses import replace

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.names import HEAD


def with_tied_head(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with one matrix, where its own output matrix equals the embedding; else ``checkpoint`` itself."""
    if not checkpoint.has_equal_head:
        return checkpoint
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name != HEAD}
    return replace(checkpoint, tensors=tensors, config=replace(checkpoint.config, tie_word_embeddings=True))
