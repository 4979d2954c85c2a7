"""A small model, and no waiting between attempts."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.sources import fetching
from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.paths import TINY


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of safetensors."""
    folder = write_checkpoint(
        random_checkpoint(np.dtype(ml_dtypes.bfloat16)), tmp_path_factory.mktemp("model") / "tiny"
    )
    (folder / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    return folder


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "WAITS", (0.01, 0.02, 0.02, 0.02, 0.02))
