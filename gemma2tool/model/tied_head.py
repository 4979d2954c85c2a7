"""The output matrix beside the embedding: one matrix, or two with equal values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import Array, LazyTensor, row_ranges, to_float32

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
_COMPARE_BYTES = 4 << 20


def has_equal_head(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether there is an output matrix whose values are the embedding's. Reads up to the first difference."""
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    return head is not None and embedding is not None and are_equal(head, embedding)


def with_tied_head(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with one matrix, where its own output matrix equals the embedding; else ``checkpoint`` itself."""
    if not has_equal_head(checkpoint.tensors):
        return checkpoint
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name != HEAD}
    return replace(checkpoint, tensors=tensors, config=replace(checkpoint.config, tie_word_embeddings=True))


def are_equal(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors have equal values: bit for bit, or as float32 where their types differ."""
    if a.shape != b.shape:
        return False
    ranges = row_ranges(a.rows, a.row_size * a.dtype.itemsize, _COMPARE_BYTES)
    return all(_same_values(a.load_rows(*rows), b.load_rows(*rows)) for rows in ranges)


def _same_values(a: Array, b: Array) -> bool:
    if a.dtype != b.dtype:
        a, b = to_float32(a), to_float32(b)
    return np.array_equal(_bits(a), _bits(b))


def _bits(rows: Array) -> Array:
    return rows.reshape(-1).view(np.uint8)
