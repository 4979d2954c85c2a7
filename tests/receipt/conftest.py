"""Outputs with their receipts, for all tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.commands import run
from tests.support.receipts import BF16


@pytest.fixture(scope="session")
def shared_outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source and its outputs with receipts: lossless in three formats, and quantized. Not to be
    changed."""
    folder = tmp_path_factory.mktemp("outputs")
    write_checkpoint(random_checkpoint(BF16), folder / "src")
    for words in (
        ("convert", "hf"),
        ("convert", "bf16.gguf"),
        ("convert", "f32.gguf", "--dtype", "f32"),
        ("convert", "out.ckpt"),
        ("quantize", "q8_0.gguf", "--type", "q8_0"),
        ("quantize", "nf4", "--type", "nf4"),
    ):
        result = run(words[0], folder / "src", folder / words[1], *words[2:], "--quiet")
        assert result.exit_code == 0, result.output
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The runs of the command make the first test that uses ``shared_outputs`` slow, whichever that is."""
    for item in items:
        if "shared_outputs" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def outputs(tmp_path: Path, shared_outputs: Path) -> Path:
    """A copy of ``shared_outputs`` that may be changed."""
    shutil.copytree(shared_outputs, tmp_path / "outputs")
    return tmp_path / "outputs"
