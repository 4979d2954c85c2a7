"""torchtune and litgpt, against state dicts that their own converters wrote."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import registry
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import (
    assert_ranges_agree,
    assert_same_tensors,
    assert_true_logits,
    oracle_config,
    refused,
    truth_of,
    write_as,
)

ORACLES = [("torchtune", "tune_state_dict.pt"), ("litgpt", "lit_model.pth")]


@pytest.mark.parametrize(("name", "file"), ORACLES)
def test_oracles(oracles: Path, name: str, file: str) -> None:
    path = oracles / "checkpoints" / name / "27b"
    config = oracle_config(oracles, "27b")
    for place in (path, path / file):
        assert registry.detect(place).name == name
        checkpoint = registry.open_checkpoint(place, config=config)
        assert_same_tensors(truth_of(oracles, "27b"), checkpoint)
    assert_ranges_agree(checkpoint)
    assert_true_logits(oracles, checkpoint, "27b")


@pytest.mark.parametrize(("name", "file"), ORACLES)
def test_state_dicts_equal_their_converters(oracles: Path, tmp_path: Path, name: str, file: str) -> None:
    """What is written for the same weights equals, tensor by tensor, what the library's own converter wrote."""
    import torch

    written = torch.load(write_as(name, truth_of(oracles, "27b"), tmp_path / "out") / file, weights_only=True)
    reference = torch.load(oracles / "checkpoints" / name / "27b" / file, weights_only=True)
    assert written.keys() == reference.keys()
    for key, tensor in reference.items():
        assert written[key].dtype == tensor.dtype and torch.equal(written[key], tensor), key


def test_what_litgpts_converter_saves_is_read(oracles: Path, fixture_dir: Path) -> None:
    """litgpt 0.5.13's convert_hf_checkpoint of the fixture, through ``incremental_save``."""
    folder = oracles / "frameworks" / "litgpt_converter"
    assert registry.detect(folder).name == "litgpt"
    assert_same_tensors(registry.open_checkpoint(fixture_dir / "model.ckpt"), registry.open_checkpoint(folder))


@pytest.mark.slow
def test_torchtunes_releases_exchange_two_norms(oracles: Path, tmp_path: Path) -> None:
    """torchtune 0.5.0 to 0.6.1 give pre- and post-feedforward norms each other's names (torchtune 2850): the oracle,
    which later code wrote, with these names exchanged is what they write.
    """
    import torch

    later = torch.load(oracles / "checkpoints" / "torchtune" / "27b" / "tune_state_dict.pt", weights_only=True)
    other = {"mlp_norm": "mlp_scale", "mlp_scale": "mlp_norm"}
    released = {".".join(other.get(part, part) for part in name.split(".")): t for name, t in later.items()}
    truth, config = truth_of(oracles, "27b"), oracle_config(oracles, "27b")
    folder = write_as("torchtune-0.6", truth, tmp_path / "written")
    written = torch.load(folder / "tune_state_dict-0.6.pt", weights_only=True)
    assert written.keys() == released.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in released.items())
    assert registry.detect(folder).name == "torchtune-0.6"
    assert_same_tensors(truth, registry.open_checkpoint(folder))
    torch.save(released, tmp_path / "model-00001-of-00001.bin")  # as torchtune's own checkpointer calls it
    checkpoint = registry.open_checkpoint(tmp_path / "model-00001-of-00001.bin", config=config)
    norms = {
        name.replace("pre_feed", "post_feed") if "pre_feed" in name else name.replace("post_feed", "pre_feed"): tensor
        for name, tensor in truth.tensors.items()
    }
    for name, tensor in norms.items():
        assert checkpoint.tensors[name].load().tobytes() == tensor.load().tobytes(), name
    (warning,) = [text for text in checkpoint.warnings if "mlp_norm" in text]
    assert "0.5.0 to 0.6.1" in warning and "call the file tune_state_dict-0.6.pt" in warning


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["torchtune", "torchtune-0.6", "litgpt"])
def test_round_trip(tmp_path: Path, name: str, dtype: str) -> None:
    source = random_checkpoint(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    folder = write_as(name, source, tmp_path / "out")
    assert registry.detect(folder).name == name
    back = registry.open_checkpoint(folder)
    assert_same_tensors(source, back)
    assert back.config.to_hf() == source.config.to_hf()


def test_interleaved_fused_matrix_of_old_litgpt(tmp_path: Path) -> None:
    """For each kv head its queries, its key, its value: the order that litgpt's qkv_reassemble undoes."""
    import torch

    source = random_checkpoint(np.dtype(np.float32))
    folder = write_as("litgpt", source, tmp_path / "new")
    state = torch.load(folder / "lit_model.pth", weights_only=True)
    heads, kv, dim, width = 4, 2, SMALL.head_dim, SMALL.hidden_size
    for i in range(SMALL.num_hidden_layers):
        q, k, v = state.pop(f"transformer.h.{i}.attn.qkv.weight").split([heads * dim, kv * dim, kv * dim])
        per_group = zip(q.view(kv, -1, width), k.view(kv, -1, width), v.view(kv, -1, width), strict=True)
        state[f"transformer.h.{i}.attn.attn.weight"] = torch.cat([row for group in per_group for row in group])
    old = tmp_path / "old"
    old.mkdir()
    torch.save({"model": state}, old / "lit_model.pth")
    (old / "config.json").write_bytes((folder / "config.json").read_bytes())
    checkpoint = registry.open_checkpoint(old)
    assert_same_tensors(source, checkpoint)
    assert_ranges_agree(checkpoint)


def test_litgpt_stores_the_tied_head_again_and_refuses_another(tmp_path: Path) -> None:
    import torch

    folder = write_as("litgpt", random_checkpoint(np.dtype(np.float32)), tmp_path / "out")
    state = torch.load(folder / "lit_model.pth", weights_only=True)
    assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])
    state["lm_head.weight"][3, 3] += 1
    torch.save(state, folder / "lit_model.pth")
    with refused("differs from the embedding"):
        registry.open_checkpoint(folder)


def test_litgpt_config_is_yaml(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    folder = write_as("litgpt", random_checkpoint(np.dtype(np.float32)), tmp_path / "out")
    content = yaml.safe_load((folder / "model_config.yaml").read_text())
    assert content["norm_eps"] == 1e-6 and isinstance(content["norm_eps"], float)
    assert content["n_embd"] == SMALL.hidden_size and content["sliding_window_indices"] == [1, 0, 1]
    assert content["attention_scores_scalar"] == 32 and content["final_logit_softcapping"] == 30.0


def test_litgpt_keeps_an_untied_head_and_torchtune_refuses_it(tmp_path: Path) -> None:
    from dataclasses import replace

    source = random_checkpoint(np.dtype(np.float32), replace(SMALL, tie_word_embeddings=False))
    folder = write_as("litgpt", source, tmp_path / "out")
    assert_same_tensors(source, registry.open_checkpoint(folder))
    with refused("torchtune format has no place for lm_head.weight"):
        write_as("torchtune", source, tmp_path / "other")


@pytest.mark.parametrize("name", ["torchtune", "litgpt"])
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    source = random_checkpoint(np.dtype(np.float32))
    with refused("written as a folder"):
        write_as(name, source, tmp_path / "weights.pth")
    with refused("cannot hold q4_k"):
        write_as(name, source, tmp_path / "x", type="q4_k")
    folder = write_as(name, source, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    with refused("no config.json beside the weights"):
        registry.open_checkpoint(folder)
    config["num_attention_heads"], config["head_dim"] = 8, 16
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 8}))
    with refused("has shape|has 256 rows, the config requires 128 \\+ 128"):
        registry.open_checkpoint(folder)
    weights = next(folder.glob("*.pt*"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with refused("does not end with the end record"):
        registry.by_name(name).open(folder)
