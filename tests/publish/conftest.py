"""A small model and a text, as token ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemma2tool.model.lazy import BFLOAT16
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of safetensors without a tokenizer."""
    return write_checkpoint(random_checkpoint(BFLOAT16), tmp_path_factory.mktemp("publish") / "small-it")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten windows of token ids, eight of which are 256 tokens."""
    path = tmp_path_factory.mktemp("text") / "text.npy"
    np.save(path, np.random.default_rng(0).integers(3, SMALL.vocab_size, (10, 32)))
    return path
