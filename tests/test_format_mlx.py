"""MLX folders, against ones that mlx-lm saved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from format_support import assert_same_tensors, assert_true_logits, refused, truth_of, write_as
from tests_support import SMALL, random_checkpoint

from gemma2tool.formats import registry


@pytest.mark.parametrize("flavour", ["hd", "27b"])
def test_oracles(oracles: Path, flavour: str) -> None:
    path = oracles / "checkpoints" / "mlx" / flavour
    assert registry.detect(path).name == "mlx"
    checkpoint = registry.open_checkpoint(path)
    assert_same_tensors(truth_of(oracles, flavour), checkpoint)
    assert_true_logits(oracles, checkpoint, flavour)


@pytest.mark.parametrize("limit", [50_000_000_000, 40_000])
def test_round_trip(tmp_path: Path, limit: int) -> None:
    source = random_checkpoint(np.dtype(ml_dtypes.bfloat16))
    folder = write_as("mlx", source, tmp_path / "out", max_shard_size=limit)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (limit < 50_000_000_000)
    assert registry.detect(folder).name == "mlx"
    assert_same_tensors(source, registry.open_checkpoint(folder))


def test_same_files_as_mlx_lm(oracles: Path, tmp_path: Path) -> None:
    """The index and the tensors; config.json says what theirs says and more."""
    from safetensors import safe_open

    theirs = oracles / "checkpoints" / "mlx" / "hd"
    mine = write_as("mlx", registry.open_checkpoint(theirs), tmp_path / "out")
    ours, index = (json.loads((each / "model.safetensors.index.json").read_text()) for each in (mine, theirs))
    assert ours == index
    with safe_open(mine / "model.safetensors", "np") as a, safe_open(theirs / "model.safetensors", "np") as b:
        assert a.metadata() == b.metadata() == {"format": "mlx"}
        assert sorted(a.keys()) == sorted(b.keys())
        for name in sorted(b.keys()):
            assert np.array_equal(a.get_tensor(name), b.get_tensor(name)), name
    read_by_mlx = {
        "model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "head_dim", "rms_norm_eps",
        "vocab_size", "num_key_value_heads", "rope_theta", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
    }  # fmt: skip
    ours, config = (json.loads((each / "config.json").read_text()) for each in (mine, theirs))
    assert {key: ours[key] for key in read_by_mlx} == {key: config[key] for key in read_by_mlx}


def test_mlx_lm_computes_the_same_within_its_window(tmp_path: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    import mlx.core as mx

    from gemma2tool.reference.streaming import logits

    source = random_checkpoint(np.dtype(np.float32))
    folder = write_as("mlx", source, tmp_path / "out")
    model, _ = mlx_lm.utils.load_model(folder)
    ids = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, SMALL.sliding_window))
    theirs = np.array(model(mx.array(ids)).astype(mx.float32))
    ours = logits(source, ids)
    assert (np.abs(ours - theirs) <= 1e-4 + 1e-5 * np.abs(ours)).all(), np.abs(ours - theirs).max()


def test_what_is_refused_or_told(tmp_path: Path) -> None:
    untied = random_checkpoint(np.dtype(np.float32), replace(SMALL, tie_word_embeddings=False))
    from gemma2tool.formats.base import WriteOptions

    told = registry.by_name("mlx").layout(untied, WriteOptions()).warnings
    assert any("sliding window" in line for line in told) and any("lm_head" in line for line in told)
    folder = write_as("mlx", random_checkpoint(np.dtype(np.float32)), tmp_path / "out")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../model.safetensors"
    index.write_text(json.dumps(content))
    with refused("not a plain file name"):
        registry.by_name("mlx").open(folder)
