"""A small checkpoint to run commands on."""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.support.checkpoints import random_checkpoint, write_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "hf"
    return write_checkpoint(random_checkpoint(np.dtype(ml_dtypes.bfloat16)), folder)


@pytest.fixture
def place(tmp_path: Path, source: Path) -> Path:
    shutil.copytree(source, tmp_path / "src")
    return tmp_path
