"""Pooling, dense layers and prompts of sentence-transformers travel with a model to folders of the same kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.pipeline.plan import make_plan
from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.formats import refused, suffix_of
from tests.support.options import write_options

FILES = {
    "modules.json": json.dumps(
        [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
    ),
    "config_sentence_transformers.json": "{}",
    "1_Pooling/config.json": '{"pooling_mode": "lasttoken"}',
    "2_Dense/config.json": "{}",
    "2_Dense/model.safetensors": "weights",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_checkpoint(random_checkpoint(np.dtype(np.float32)), tmp_path / "model")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize("to", ["hf", "hf-bin", "mlx"])
def test_they_are_carried_byte_for_byte(model: Path, to: str) -> None:
    """mlx-serve 116, omlx PR 2594: conversions without 1_Pooling serve other embeddings."""
    with registry.open_checkpoint(model) as checkpoint:
        output = registry.by_name(to).layout(checkpoint, write_options(name="out"))
        assert not checkpoint.loader_files
    assert {name: output.assets[name].decode() for name in FILES} == FILES


@pytest.mark.parametrize("to", ["gguf", "gemma-cpp"])
def test_what_has_no_place_for_them_names_them(model: Path, tmp_path: Path, to: str) -> None:
    destination = tmp_path / f"out{suffix_of(to)}"
    with registry.open_checkpoint(model) as checkpoint:
        plan = make_plan(checkpoint, destination, to=to, options=write_options(name=destination.name))
    (warning,) = (line for line in plan.output.warnings if "left behind" in line)
    assert all(name in warning for name in FILES)


@pytest.mark.parametrize("listed", ["../1_Pooling", "/etc", "1_Pooling/..", 3])
def test_a_list_that_names_other_places_carries_nothing(model: Path, listed: object) -> None:
    (model / "modules.json").write_text(json.dumps([{"path": listed}]))
    with registry.open_checkpoint(model) as checkpoint:
        assert not set(FILES) & set(checkpoint.assets)
        assert checkpoint.loader_files


@pytest.fixture
def in_a_folder(model: Path) -> Path:
    """The layout of older releases: the model itself is a module with a folder."""
    inner = model / "0_Transformer"
    inner.mkdir()
    for file in list(model.iterdir()):
        if file.is_file() and file.name not in FILES:
            file.rename(inner / file.name)
    (inner / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    listed = json.loads(FILES["modules.json"])
    listed[0] |= {"path": inner.name, "type": "sentence_transformers.models.Transformer"}
    (model / "modules.json").write_text(json.dumps(listed))
    return model


@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_a_model_in_a_folder_of_its_own_is_written_at_the_top(in_a_folder: Path, place: str) -> None:
    """sentence-transformers 6.2 gives equal embeddings for both (by hand)."""
    assert registry.detect(in_a_folder).name == "hf"
    with registry.open_checkpoint(in_a_folder / place) as checkpoint:
        assert checkpoint.path == in_a_folder / "0_Transformer" and not checkpoint.loader_files
        output = registry.by_name("hf").layout(checkpoint, write_options(name="out"))
    first, *others = json.loads(output.assets["modules.json"])
    assert first["path"] == "" and others == json.loads(FILES["modules.json"])[1:]
    assert output.assets["sentence_bert_config.json"] == b'{"max_seq_length": 32}'
    for name in FILES.keys() - {"modules.json"}:
        assert output.assets[name].decode() == FILES[name], name


@pytest.mark.parametrize("listed", ["../1_Pooling", "0_Transformer/..", "1_Pooling", 3])
def test_a_list_whose_first_module_is_not_the_model_is_not_followed(in_a_folder: Path, listed: object) -> None:
    (in_a_folder / "modules.json").write_text(
        json.dumps([{"path": listed, "type": "x.Transformer" if listed != "1_Pooling" else "x.Pooling"}])
    )
    with refused("not a checkpoint itself, but holds .*0_Transformer .hf."):
        registry.detect(in_a_folder)
