"""The trained fixture, and a prompt, for the tests of consumers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint
from tests.support.checkpoints import first_layers

LENGTH = 150  # the fixture's window is 64


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, fixture_dir: Path) -> Iterator[Checkpoint]:
    """The fixture, or as many of its layers as the module's LAYERS says."""
    with registry.open_checkpoint(fixture_dir / "model.ckpt") as checkpoint:
        yield first_layers(checkpoint, getattr(request.module, "LAYERS", checkpoint.config.num_hidden_layers))


@pytest.fixture(scope="module")
def ids(fixture_dir: Path) -> np.ndarray:
    """A prompt of held-out text, longer than the window: (1, LENGTH)."""
    return np.load(fixture_dir / "heldout.npy")[:1, :LENGTH].astype(np.int64)
