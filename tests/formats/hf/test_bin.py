"""Hugging Face folders from before safetensors, loaded by transformers and compared with what torch.save writes."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import registry
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import assert_ranges_agree, assert_same_tensors, refused, write_as


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("limit", [50_000_000_000, 60_000])
def test_transformers_loads_it_and_computes_the_same(tmp_path: Path, limit: int) -> None:
    import torch
    from transformers import Gemma2ForCausalLM

    from gemma2tool.reference.streaming import logits

    source = random_checkpoint(np.dtype(np.float32))
    folder = write_as("hf-bin", source, tmp_path / "out", max_shard_size=limit)
    assert (folder / "pytorch_model.bin").exists() == (limit > 60_000)
    model, info = Gemma2ForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 24))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    difference = np.abs(logits(registry.open_checkpoint(folder), ids) - expected)
    assert (difference <= 5e-5 + 1e-5 * np.abs(expected)).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("limit", [50_000_000_000, 60_000])
def test_round_trip(tmp_path: Path, dtype: str, limit: int) -> None:
    source = random_checkpoint(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    folder = write_as("hf-bin", source, tmp_path / "out", max_shard_size=limit)
    assert registry.detect(folder).name == "hf-bin"
    back = registry.open_checkpoint(folder)
    assert_same_tensors(source, back)
    assert_ranges_agree(back)


def test_a_tied_head_that_shares_its_storage(tmp_path: Path) -> None:
    """transformers 4 saved the head and the embedding as one storage."""
    import torch

    source = random_checkpoint(np.dtype(np.float32))
    folder = write_as("hf-bin", source, tmp_path / "out")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert type(state).__name__ == "OrderedDict" and "lm_head.weight" not in state
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    checkpoint = registry.open_checkpoint(folder)
    assert_same_tensors(source, checkpoint)
    assert any("copy" in line for line in checkpoint.warnings)


def test_safetensors_in_the_same_folder_take_precedence(tmp_path: Path) -> None:
    source = random_checkpoint(np.dtype(np.float32))
    folder = write_as("hf", source, tmp_path / "out")
    (folder / "pytorch_model.bin").write_bytes(
        (write_as("hf-bin", source, tmp_path / "bin") / "pytorch_model.bin").read_bytes()
    )
    assert registry.detect(folder).name == "hf"


def test_refusals(tmp_path: Path) -> None:
    source = random_checkpoint(np.dtype(np.float32))
    with refused("the hf-bin format cannot hold nf4"):
        write_as("hf-bin", source, tmp_path / "x", type="nf4")
    folder = write_as("hf-bin", source, tmp_path / "out", max_shard_size=60_000)
    index = folder / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "pytorch_model-00001-of-00099.bin"
    index.write_text(json.dumps(content))
    with refused("no such file|is not there"):
        registry.open_checkpoint(folder)
