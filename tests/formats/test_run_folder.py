"""Folders of training runs: not checkpoints themselves, but folders of checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from tests.support.checkpoints import random_checkpoint
from tests.support.formats import refused, write_as


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint in each of some formats, by the format's name."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("hf", "litgpt", "keras"):
        write_as(name, random_checkpoint(np.dtype(np.float32)), folder / name)
    return folder


def _run(folder: Path, checkpoints: Path, name: str, *places: str) -> Path:
    for place in places:
        shutil.copytree(checkpoints / name, folder / place)
    (folder / "runs" / "Nov27").mkdir(parents=True)
    (folder / "runs" / "Nov27" / "events.out.tfevents.1").touch()
    return folder


@pytest.mark.slow
def test_steps_of_a_trainer_are_named_in_their_order(tmp_path: Path, checkpoints: Path) -> None:
    """transformers' and trl's ``output_dir/checkpoint-STEP``."""
    run = _run(tmp_path / "out", checkpoints, "hf", "checkpoint-1000", "checkpoint-500", "checkpoint-1500")
    steps = r"checkpoint-500 .hf., checkpoint-1000 .hf., checkpoint-1500 .hf.$"
    with refused("out: not a checkpoint itself, but holds 3 checkpoints: " + steps) as caught:
        registry.detect(run)
    assert caught.value.id == "input.run" and caught.value.hint == f"choose one: {run / 'checkpoint-1500'}"
    assert registry.detect(run / "checkpoint-500").name == "hf"


def test_a_run_whose_final_model_is_beside_the_steps_is_that_model(tmp_path: Path, checkpoints: Path) -> None:
    run = _run(tmp_path / "out", checkpoints, "hf", "checkpoint-500")
    for file in (checkpoints / "hf").iterdir():
        shutil.copy(file, run)
    assert registry.open_checkpoint(run).path == run


def test_deeper_folders(tmp_path: Path, checkpoints: Path) -> None:
    """litgpt's ``out/finetune/full/{step-000100,final}``; an extracted archive with one preset."""
    run = _run(tmp_path / "out", checkpoints, "litgpt", "finetune/full/step-000100", "finetune/full/final")
    with refused("2 checkpoints: finetune/full/final .litgpt., finetune/full/step-000100 .litgpt."):
        registry.detect(run)
    run = _run(tmp_path / "extracted", checkpoints, "keras", "gemma2_2b_en/3")
    with refused("but holds one .keras.") as caught:
        registry.detect(run)
    assert caught.value.hint == f"give its folder: {run / 'gemma2_2b_en/3'}"


def test_adapters_of_a_run(tmp_path: Path) -> None:
    for step in (20, 100):
        (tmp_path / f"out/checkpoint-{step}").mkdir(parents=True)
        (tmp_path / f"out/checkpoint-{step}/adapter_config.json").write_text("{}")
    with refused("2 checkpoints: checkpoint-20 .adapter., checkpoint-100 .adapter.") as caught:
        registry.detect(tmp_path / "out")
    assert "--lora" in caught.value.hint and caught.value.hint.endswith("checkpoint-100")


def test_many_steps_are_shortened(tmp_path: Path, checkpoints: Path) -> None:
    for step in range(20):
        (tmp_path / f"out/checkpoint-{step}").mkdir(parents=True)
        (tmp_path / f"out/checkpoint-{step}/adapter_config.json").write_text("{}")
    with refused(r"20 checkpoints: .*checkpoint-5 .adapter., \.\.\., checkpoint-14 .*checkpoint-19 .adapter.$"):
        registry.detect(tmp_path / "out")


def test_a_folder_without_any_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    with refused("not a Gemma 2 checkpoint in a known format") as caught:
        registry.detect(tmp_path)
    assert caught.value.id == "input.unknown"
