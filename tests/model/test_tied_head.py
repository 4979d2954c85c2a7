"""An output matrix that is a copy of the embedding: found by its values, which are read once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import Array, ArrayTensor
from gemma2tool.model.names import EMBEDDING, HEAD
from gemma2tool.model.tied_head import with_tied_head
from gemma2tool.verify.run import VerifySettings, verify
from tests.support.checkpoints import random_checkpoint


class Counted(ArrayTensor):
    """``rows``: how many were read."""

    rows_read = 0

    def load_rows(self, first: int, last: int) -> Array:
        self.rows_read += last - first
        return super().load_rows(first, last)


@pytest.fixture
def tied() -> Checkpoint:
    return random_checkpoint(np.dtype(np.float32))


def with_head(checkpoint: Checkpoint, head: Array) -> tuple[Checkpoint, Counted]:
    counted = Counted(head)
    config = replace(checkpoint.config, tie_word_embeddings=False)
    return replace(checkpoint, config=config, tensors={**checkpoint.tensors, HEAD: counted}), counted


def test_it_is_read_once_whoever_asks(tied: Checkpoint) -> None:
    source, head = with_head(tied, tied.tensors[EMBEDDING].load())
    for _ in range(3):
        one = with_tied_head(source)
        assert HEAD not in one.tensors and one.config.tie_word_embeddings
    assert verify(source, tied, VerifySettings(levels=["completeness"])).passed
    assert head.rows_read == head.rows


def test_another_matrix_under_its_name_is_compared(tied: Checkpoint) -> None:
    source, _ = with_head(tied, tied.tensors[EMBEDDING].load())
    assert source.has_equal_head
    source.tensors[HEAD] = ArrayTensor(source.tensors[HEAD].load() + 1)
    assert not source.has_equal_head and with_tied_head(source) is source


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_values_of_other_types_are_compared_as_float32(tied: Checkpoint, dtype: type) -> None:
    embedding = ArrayTensor(tied.tensors[EMBEDDING].load().astype(np.float16).astype(np.float32))
    tied.tensors[EMBEDDING] = embedding
    source, _ = with_head(tied, embedding.array.astype(dtype))
    assert source.has_equal_head
