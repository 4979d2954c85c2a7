"""What torchtune 0.6.1 saved (fixtures/frameworks/README.md), and how its two namings of the norms are told apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint
from tests.support.checkpoints import random_checkpoint
from tests.support.formats import assert_same_tensors, refused, write_as
from tests.support.paths import FRAMEWORKS, TINY

torch = pytest.importorskip("torch")

SAVED = FRAMEWORKS / "torchtune"
OTHER = {"mlp_norm": "mlp_scale", "mlp_scale": "mlp_norm"}


def _warnings(checkpoint: Checkpoint) -> list[str]:
    return [text for text in checkpoint.warnings if "mlp_norm" in text or "as later code" in text]


def test_the_norms_of_its_own_checkpointer_are_told_by_their_values() -> None:
    """Its Hugging Face checkpointer saved the same weights, with the names exchanged back."""
    hugging_face = registry.open_checkpoint(SAVED / "hf" / "epoch_0")
    own = registry.open_checkpoint(SAVED / "own" / "epoch_0")
    assert own.format == "torchtune"
    assert_same_tensors(hugging_face, own)
    (warning,) = _warnings(own)
    assert "have the names of torchtune 0.5.0 to 0.6.1" in warning and "in each other's place" in warning


def test_a_run_with_the_model_and_its_adapter_is_a_models_run() -> None:
    with refused("but holds one .hf.") as caught:
        registry.detect(SAVED / "hf")
    assert caught.value.hint == f"give its folder: {SAVED / 'hf' / 'epoch_0'}"
    with refused("but holds one .adapter."):
        registry.detect(SAVED / "hf-adapter")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained fixture with the later names."""
    with registry.open_checkpoint(TINY / "model.ckpt") as source:
        return write_as("torchtune", source, tmp_path_factory.mktemp("trained") / "later")


def _renamed(folder: Path, out: Path) -> Path:
    """The same dict with the names of the releases."""
    shutil.copytree(folder, out)
    state = torch.load(out / "tune_state_dict.pt", weights_only=True)
    state = {".".join(OTHER.get(part, part) for part in name.split(".")): tensor for name, tensor in state.items()}
    torch.save(state, out / "tune_state_dict.pt")
    return out


@pytest.mark.slow
def test_both_namings_of_a_trained_model_are_read(trained: Path, tmp_path: Path) -> None:
    source = registry.open_checkpoint(TINY / "model.ckpt")
    later = registry.open_checkpoint(trained)
    assert_same_tensors(source, later)
    assert not _warnings(later)
    released = registry.open_checkpoint(_renamed(trained, tmp_path / "released"))
    assert_same_tensors(source, released)
    assert len(_warnings(released)) == 1


@pytest.mark.slow
def test_a_name_that_the_values_contradict_is_named(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "x")
    (tmp_path / "x" / "tune_state_dict.pt").rename(tmp_path / "x" / "tune_state_dict-0.6.pt")
    (warning,) = _warnings(registry.open_checkpoint(tmp_path / "x"))
    assert "because of its name" in warning and "call it tune_state_dict.pt" in warning


@pytest.mark.parametrize("values", ["random", "0", "nan"])
def test_values_that_tell_nothing_leave_the_question_open(tmp_path: Path, values: str) -> None:
    folder = write_as("torchtune", random_checkpoint(np.dtype(np.float32)), tmp_path / "x")
    state = torch.load(folder / "tune_state_dict.pt", weights_only=True)
    if values != "random":
        norms = [tensor for name, tensor in state.items() if name.split(".")[-2] in OTHER]
        assert len(norms) == 6
        for tensor in norms:
            tensor.fill_(float(values))
    torch.save(state, folder / "tune_state_dict.pt")
    (warning,) = _warnings(registry.open_checkpoint(folder))
    assert "neither the file nor its values say" in warning and "call the file tune_state_dict-0.6.pt" in warning
