"""Adapters as torchtune 0.6.1 and litgpt 0.5.13 saved them; fixtures/frameworks/README.md says how."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.adapters.merging import merge
from gemma2tool.reference.streaming import logits
from tests.support.formats import refused
from tests.support.paths import FRAMEWORKS


@pytest.mark.parametrize(
    ("adapter", "framework"),
    [
        ("torchtune/hf-adapter/epoch_0", "torchtune"),
        ("torchtune/hf-adapter/epoch_0/adapter_model.pt", "torchtune"),
        ("torchtune/hf/epoch_0", "torchtune"),
        ("litgpt", "litgpt"),
        ("litgpt/lit_model.pth.lora", "litgpt"),
    ],
)
def test_merged_it_computes_what_the_framework_does(adapter: str, framework: str) -> None:
    saved = np.load(FRAMEWORKS / framework / "logits.npz")
    with registry.open_checkpoint(FRAMEWORKS / "base") as base:
        actual = logits(merge(base, FRAMEWORKS / adapter), saved["ids"].astype(np.int32))
    assert np.abs(actual - saved["logits"]).max() < 1e-4


def test_torchtunes_own_checkpointer_leaves_out_rank_and_alpha(tmp_path: Path) -> None:
    folder = FRAMEWORKS / "torchtune" / "own" / "epoch_0"
    with registry.open_checkpoint(FRAMEWORKS / "base") as base:
        with refused("adapter_model.pt: there is no adapter_config.json beside it"):
            merge(base, folder / "adapter_model.pt")
        shutil.copy(folder / "adapter_model.pt", tmp_path)
        (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
        saved = np.load(FRAMEWORKS / "torchtune" / "logits.npz")
        actual = logits(merge(base, tmp_path), saved["ids"].astype(np.int32))
    assert np.abs(actual - saved["logits"]).max() < 1e-4
