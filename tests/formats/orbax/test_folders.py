"""The folders that trainers and Orbax's CheckpointManager put around the arrays of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.orbax import folders, state
from tests.support.formats import refused

EMBEDDING = ("embedder", "input_embedding")


def _tree(folder: Path, *names: str) -> Path:
    """A folder with the metadata of arrays, by default of a model's, and no arrays."""
    folder.mkdir(parents=True)
    entries = {
        name: {"key_metadata": [{"key": key, "key_type": 2} for key in name.split(".")]}
        for name in names or ("params.embedder.input_embedding", "opt_state.0.mu.embedder.input_embedding", "step")
    }
    (folder / "_METADATA").write_text(json.dumps({"tree_metadata": entries}))
    return folder


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/7", "checkpoints/7/default"])
def test_a_single_step_is_found_from_every_folder_around_it(tmp_path: Path, place: str) -> None:
    tree = _tree(tmp_path / "run/checkpoints/7/default")
    (tmp_path / "run/checkpoints/7/timer").mkdir()
    path = tmp_path / "run" / place
    assert registry.detect(path).name == "flax"
    assert folders.only_model(path, EMBEDDING) == tree


def test_several_steps_are_listed_in_their_order(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        _tree(tmp_path / f"run/checkpoints/{step}/default")
    with refused("run: holds 3 checkpoints: checkpoints/5, checkpoints/20, checkpoints/100$") as caught:
        registry.open_checkpoint(tmp_path / "run")
    assert caught.value.id == "orbax.steps" and caught.value.hint.endswith("/run/checkpoints/100")
    for step in range(200, 230):
        _tree(tmp_path / f"run/checkpoints/{step}/default")
    with refused(r"33 checkpoints: 5, 20, 100, 200, 201, \.\.\., 225, 226, 227, 228, 229"):
        folders.only_model(tmp_path / "run/checkpoints", EMBEDDING)


def test_models_in_several_items_of_a_step_are_listed(tmp_path: Path) -> None:
    for item in ("policy", "reference"):
        _tree(tmp_path / "3" / item, "embedder.input_embedding")
    _tree(tmp_path / "3" / "opt_state", "0.mu.embedder.input_embedding")
    with refused("holds 2 checkpoints: 3/policy, 3/reference"):
        folders.only_model(tmp_path, EMBEDDING)


def test_the_items_of_another_model_are_not_taken_for_this_one(tmp_path: Path) -> None:
    """A folder of MaxText's and the optimizer's items: each is found by its own embedding."""
    tree = _tree(tmp_path / "0/items", "params.params.token_embedder.embedding")
    _tree(tmp_path / "0/optimizer_state", "mu.token_embedder.embedding")
    assert folders.models(tmp_path, ("token_embedder", "embedding")) == [tree]
    assert registry.detect(tmp_path).name == "maxtext"
    assert not folders.models(tmp_path, EMBEDDING)


def test_a_step_that_was_not_completed(tmp_path: Path) -> None:
    """orbax 647: what an interrupted save leaves has a suffix. It is passed over, unless there is nothing else."""
    unfinished = tmp_path / "run/checkpoints/9.orbax-checkpoint-tmp-1703334121930256"
    _tree(unfinished / "default.orbax-checkpoint-tmp-1703334121930257")
    with refused("tmp-1703334121930256: Orbax has not completed this checkpoint") as caught:
        registry.open_checkpoint(tmp_path / "run")
    assert caught.value.id == "orbax.unfinished"
    tree = _tree(tmp_path / "run/checkpoints/8/default")
    assert folders.only_model(tmp_path / "run", EMBEDDING) == tree


def test_parts_of_processes_that_are_not_merged(tmp_path: Path) -> None:
    """Each process writes a database of its own; without the manifest that merges them, nothing can be restored."""
    tree = _tree(tmp_path / "0/default")
    (tree / "ocdbt.process_0").mkdir()
    (tree / "ocdbt.process_0" / "manifest.ocdbt").touch()
    with refused("default: Orbax has not completed this checkpoint"):
        registry.open_checkpoint(tmp_path)


def test_checkpoints_beside_the_weights_of_another_format_are_not_looked_for(tmp_path: Path) -> None:
    _tree(tmp_path / "run/checkpoints/7/default")
    (tmp_path / "run" / "model.safetensors").touch()
    assert not folders.trees(tmp_path / "run")


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/ckpt_7", "checkpoints/ckpt_7/default"])
def test_the_folders_of_the_config(tmp_path: Path, place: str) -> None:
    """The run's config and tokenizer count for its steps; a folder that has nothing to do with the run does not."""
    tree = _tree(tmp_path / "run/checkpoints/ckpt_7/default")
    around = folders.surroundings(tmp_path / "run" / place, tree)
    assert around[0] == tmp_path / "run" / place
    assert tmp_path / "run" in around and tmp_path not in around


@pytest.mark.parametrize(
    ("name", "match", "id"),
    [
        ("layer_0.attn.q_einsum.lora.a", "a LoRA adapter .layer_0.attn.q_einsum.lora.a", "orbax.adapter"),
        ("layers.0.attn.q_einsum.w_lora_a.value", "a LoRA adapter .layers.0.attn.q_einsum.w_lora_a", "orbax.adapter"),
        ("params.aqt.decoder.mlp.AqtDotGeneral_0.qrhs.frozen", "quantized by AQT", "orbax.quantized"),
        ("params.params.decoder.layers.mlp_local.wo.kernel.qvalue", "quantized by Qwix", "orbax.quantized"),
    ],
)
def test_what_takes_the_place_of_weights_is_named(name: str, match: str, id: str) -> None:
    """google-deepmind/gemma 254, maxtext 731: LoRA of gm and of tunix, MaxText's quantized checkpoints."""
    with refused(match) as caught:
        state.refuse_unmerged(["params.embedder.input_embedding", name], "here")
    assert caught.value.id == id
