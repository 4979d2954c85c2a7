"""Pooling, dense layers and prompts of sentence-transformers travel with a model to folders of the same kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.pipeline.plan import make_plan
from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.formats import suffix_of
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
