"""Several weights in one folder: which are read is said, and a file that a format claims by its name is never passed
over for its neighbor.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from tests.support.checkpoints import random_checkpoint
from tests.support.formats import assert_same_tensors, refused, suffix_of, write_as

BASE = random_checkpoint(np.dtype(np.float32), seed=1)
TUNED = random_checkpoint(np.dtype(np.float32), seed=2)
NAMED = {"litgpt": "lit_model.pth", "torchtune": "tune_state_dict.pt", "torchtune-0.6": "tune_state_dict-0.6.pt"}


def _both(tmp_path: Path, name: str) -> Path:
    """A folder with the base model as safetensors and a tuned one in another format."""
    folder = write_as("hf", BASE, tmp_path / "both")
    other = write_as(name, TUNED, tmp_path / f"other{suffix_of(name) or ''}")
    for file in [other] if other.is_file() else other.iterdir():
        if file.name != "config.json":
            shutil.copy(file, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_the_frameworks_file_is_read_and_the_other_named(tmp_path: Path, name: str) -> None:
    """litgpt converts inside the folder that holds the downloaded model.safetensors."""
    folder = _both(tmp_path, name)
    with registry.open_checkpoint(folder) as checkpoint:
        assert_same_tensors(TUNED, checkpoint)
        (warning,) = [text for text in checkpoint.all_warnings if "is read, not" in text]
    assert f"{NAMED[name]} ({name}) is read, not model.safetensors (hf) beside it" in warning
    with registry.open_checkpoint(folder / "model.safetensors") as checkpoint:
        assert_same_tensors(BASE, checkpoint)
        assert not any("is read, not" in text for text in checkpoint.all_warnings)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("damage", ["cut", "text", "empty", "pickle"])
def test_a_damaged_file_is_refused_and_the_base_model_not_read(tmp_path: Path, name: str, damage: str) -> None:
    folder = _both(tmp_path, name)
    weights = folder / NAMED[name]
    content = {"cut": weights.read_bytes()[:-50], "text": b"Entry not found", "empty": b"", "pickle": b"\x80\x02}."}
    weights.write_bytes(content[damage])
    assert registry.detect(folder).name == name
    with refused(NAMED[name]):
        registry.open_checkpoint(folder)


@pytest.mark.slow
def test_safetensors_come_before_torch_files_as_in_transformers(tmp_path: Path) -> None:
    folder = _both(tmp_path, "hf-bin")
    with registry.open_checkpoint(folder) as checkpoint:
        assert_same_tensors(BASE, checkpoint)
        assert any("not pytorch_model.bin (hf-bin) beside it" in text for text in checkpoint.all_warnings)
    with registry.open_checkpoint(folder / "pytorch_model.bin") as checkpoint:
        assert_same_tensors(TUNED, checkpoint)


@pytest.mark.slow
def test_a_single_file_comes_before_the_shards_of_another_save(tmp_path: Path) -> None:
    """transformers reads model.safetensors where there is one, whatever shards and index are beside it."""
    folder = write_as("hf", BASE, tmp_path / "hf")
    shards = write_as("hf", TUNED, tmp_path / "shards", max_shard_size=60_000)
    for file in shards.glob("model*"):
        shutil.copy(file, folder)
    with registry.open_checkpoint(folder) as checkpoint:
        assert_same_tensors(BASE, checkpoint)
        assert any("model-00001-of-" in text for text in checkpoint.all_warnings)


@pytest.mark.parametrize("name", ["gguf", "gemma-pytorch", "gemma-cpp"])
def test_single_file_formats_beside_a_folder(tmp_path: Path, name: str) -> None:
    folder = _both(tmp_path, name)
    with registry.open_checkpoint(folder) as checkpoint:
        texts = [text for text in checkpoint.all_warnings if "is read, not" in text]
    assert len(texts) == 1 and f"({checkpoint.format}) is read" in texts[0]


def test_an_adapter_beside_torch_weights_does_not_hide_them(tmp_path: Path) -> None:
    folder = write_as("hf-bin", BASE, tmp_path / "bin")
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert registry.detect(folder).name == "hf-bin"
    with registry.open_checkpoint(folder) as checkpoint:
        assert_same_tensors(BASE, checkpoint)
