"""Reading and writing Hugging Face and gemma_pytorch checkpoints, against files that their own code wrote."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats import registry
from gemma2tool.formats.hf.format import HuggingFace
from gemma2tool.formats.torch.gemma_pytorch.format import GemmaPytorch
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.tensors import tensor_specs
from tests.support.checkpoints import random_checkpoint, write_checkpoint

GEMMA_PYTORCH = ["hd", "27b", "hd_bf16", "27b_bf16", "hd_sharded", "27b_sharded", "hd_int8", "27b_int8"]


def same_tensors(a: Checkpoint, b: Checkpoint) -> None:
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        written, other = tensor.load(), b.tensors[name].load()
        assert written.dtype == other.dtype, name
        assert written.tobytes() == other.tobytes(), name


@pytest.mark.parametrize("variant", GEMMA_PYTORCH)
def test_gemma_pytorch_oracles_give_the_tensors_of_hf(oracles: Path, variant: str) -> None:
    path = oracles / "checkpoints" / "gemma_pytorch" / variant
    assert registry.detect(path).name == "gemma-pytorch"
    truth = HuggingFace().open(oracles / "checkpoints" / "hf" / variant.split("_")[0])
    checkpoint = registry.open_checkpoint(path)
    for name, tensor in truth.tensors.items():
        expected, result = tensor.load(), checkpoint.tensors[name].load().astype(np.float32)
        if "int8" in variant and not name.endswith("norm.weight"):
            row = np.abs(expected).max(axis=1, keepdims=True)
            assert np.abs(result - expected).max() > 0
            assert (np.abs(result - expected) <= row / 127 * 0.5001).all(), name
        else:
            assert np.array_equal(result, expected), name


def test_a_range_of_rows(oracles: Path) -> None:
    for variant in ("hd_bf16", "hd_int8"):
        checkpoint = registry.open_checkpoint(oracles / "checkpoints" / "gemma_pytorch" / variant)
        for tensor in checkpoint.tensors.values():
            whole = tensor.load()
            third = tensor.rows // 3
            assert np.array_equal(tensor.load_rows(third, 2 * third), whole[third : 2 * third])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("path", ["hf", "model.ckpt"])
def test_round_trips_are_exact(tmp_path: Path, dtype: str, path: str) -> None:
    source = random_checkpoint(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    first = write_checkpoint(source, tmp_path / path)
    same_tensors(source, registry.open_checkpoint(first))
    other = write_checkpoint(registry.open_checkpoint(first), tmp_path / ("back.ckpt" if path == "hf" else "back"))
    back = registry.open_checkpoint(other)
    same_tensors(source, back)
    written_by_hf = {"architectures", "dtype"}  # what a config.json says beyond the model itself
    configs = [registry.open_checkpoint(path).config.to_hf() for path in (first, other)]
    assert len({str(sorted((k, v) for k, v in config.items() if k not in written_by_hf)) for config in configs}) == 1


def test_ckpt_loads_as_gemma_pytorch_loads_it(tmp_path: Path) -> None:
    """gemma_pytorch's own loader: torch.load(..., mmap=True, weights_only=True)["model_state_dict"]."""
    import torch

    source = random_checkpoint(np.dtype(ml_dtypes.bfloat16))
    path = write_checkpoint(source, tmp_path / "model.ckpt")
    state = torch.load(path, mmap=True, weights_only=True)["model_state_dict"]
    config = source.config
    assert state["freqs_cis"].dtype == torch.complex64
    assert tuple(state["freqs_cis"].shape) == (2 * config.max_position_embeddings, config.head_dim // 2)
    assert torch.equal(state["freqs_cis"][0], torch.ones(config.head_dim // 2, dtype=torch.complex64))
    fused = state["model.layers.1.self_attn.qkv_proj.weight"]
    rows = np.concatenate([source.tensors[f"model.layers.1.self_attn.{x}_proj.weight"].load() for x in "qkv"])
    assert fused.dtype == torch.bfloat16
    assert fused.view(torch.int16).numpy().tobytes() == rows.tobytes()
    assert len(state) == 1 + 1 + 8 * config.num_hidden_layers + 1 + config.num_hidden_layers


@pytest.mark.slow
@pytest.mark.parametrize("limit", [50_000_000_000, 40_000])
def test_hf_folder_is_byte_identical_to_save_pretrained(tmp_path: Path, limit: int) -> None:
    """What transformers saves after it loaded a plain file, shards and index included."""
    from safetensors.numpy import save_file
    from transformers import Gemma2ForCausalLM

    source = random_checkpoint(np.dtype(ml_dtypes.bfloat16))
    written = write_checkpoint(source, tmp_path / "written", max_shard_size=limit)
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(
        {name: tensor.load() for name, tensor in source.tensors.items()}, plain / "model.safetensors", {"format": "pt"}
    )
    (plain / "config.json").write_bytes((written / "config.json").read_bytes())
    Gemma2ForCausalLM.from_pretrained(plain, dtype="auto").save_pretrained(tmp_path / "reference", max_shard_size=limit)
    weights = sorted(path.name for path in (tmp_path / "reference").glob("model*"))
    assert sorted(path.name for path in written.glob("model*")) == weights
    assert (len(weights) > 2) == (limit < 50_000_000_000)
    for name in weights:
        assert (written / name).read_bytes() == (tmp_path / "reference" / name).read_bytes(), name
    reference = json.loads((tmp_path / "reference" / "config.json").read_text())
    actual = json.loads((written / "config.json").read_text())
    reference.pop("transformers_version")
    actual.pop("transformers_version", None)
    assert actual == reference


@pytest.mark.slow
def test_hf_folder_loads_in_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import Gemma2ForCausalLM

    from gemma2tool.reference.streaming import logits

    source = random_checkpoint(np.dtype(np.float32))
    path = write_checkpoint(source, tmp_path / "out")
    model, info = Gemma2ForCausalLM.from_pretrained(path, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = np.random.default_rng(0).integers(0, source.config.vocab_size, (2, 24))
    with torch.no_grad():
        reference = model(torch.from_numpy(ids)).logits.numpy()
    actual = logits(registry.open_checkpoint(path), ids)
    assert (np.abs(actual - reference) <= 5e-5 + 1e-5 * np.abs(reference)).all()


@pytest.mark.slow
def test_a_model_without_a_head_is_read(tmp_path: Path) -> None:
    """Embedding models are saved from transformers' Gemma2Model, whose names lack the prefix."""
    from safetensors import safe_open
    from transformers import Gemma2Model

    source = random_checkpoint(np.dtype(np.float32))
    Gemma2Model.from_pretrained(write_checkpoint(source, tmp_path / "whole")).save_pretrained(tmp_path / "base")
    with safe_open(tmp_path / "base" / "model.safetensors", "np") as file:
        assert "embed_tokens.weight" in file.keys()  # noqa: SIM118
    same_tensors(source, registry.open_checkpoint(tmp_path / "base"))


def test_source_config_survives(oracles: Path, tmp_path: Path) -> None:
    """A config that transformers wrote is written unchanged, with its unknown keys."""
    folder = oracles / "quantized" / "source"
    path = write_checkpoint(registry.open_checkpoint(folder), tmp_path / "out")
    assert (path / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert (path / "generation_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()
    assert (path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


# -- what is refused ---------------------------------------------------------------------------------------------------


def edit_safetensors(path: Path, change) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    return write_checkpoint(random_checkpoint(np.dtype(np.float32)), tmp_path / "hf")


def test_missing_tensor_is_named(hf_folder: Path) -> None:
    edit_safetensors(hf_folder / "model.safetensors", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputRefused, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        registry.open_checkpoint(hf_folder)


def test_unexpected_tensor_is_named(hf_folder: Path) -> None:
    edit_safetensors(hf_folder / "model.safetensors", lambda t: t.update(extra=np.zeros(3, np.float32)))
    with pytest.raises(InputRefused, match="extra is unexpected"):
        registry.open_checkpoint(hf_folder)


def test_config_that_contradicts_the_weights_is_refused(hf_folder: Path) -> None:
    config = json.loads((hf_folder / "config.json").read_text())
    config["intermediate_size"] += 8
    (hf_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputRefused, match="gate_proj.weight has shape"):
        registry.open_checkpoint(hf_folder)


def test_other_model_types_are_refused(hf_folder: Path) -> None:
    config = json.loads((hf_folder / "config.json").read_text())
    (hf_folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(InputRefused, match="'llama'"):
        registry.open_checkpoint(hf_folder)


def test_equal_lm_head_is_dropped_and_another_refused(hf_folder: Path) -> None:
    path = hf_folder / "model.safetensors"
    edit_safetensors(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    checkpoint = registry.open_checkpoint(hf_folder)
    assert "lm_head.weight" not in checkpoint.tensors and "copy" in checkpoint.warnings[0]
    edit_safetensors(path, lambda t: t["lm_head.weight"].__setitem__((3, 3), 1.5))
    with pytest.raises(InputRefused, match="tie_word_embeddings"):
        registry.open_checkpoint(hf_folder)


def test_forged_index_is_refused(tmp_path: Path) -> None:
    source = random_checkpoint(np.dtype(np.float32))
    folder = write_checkpoint(source, tmp_path / "sharded", max_shard_size=60_000)
    same_tensors(source, registry.open_checkpoint(folder))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shards = sorted(set(content["weight_map"].values()))
    content["weight_map"]["model.norm.weight"] = shards[0]
    index.write_text(json.dumps(content))
    with pytest.raises(InputRefused, match=r"model\.norm\.weight should be in"):
        registry.open_checkpoint(folder)
    content["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(InputRefused):
        registry.open_checkpoint(folder)


def test_no_config_and_no_released_shape_asks_for_one(oracles: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes((oracles / "checkpoints" / "gemma_pytorch" / "hd" / "model.ckpt").read_bytes())
    with pytest.raises(UsageError, match="head_dim") as caught:
        registry.open_checkpoint(path)
    assert "--config" in caught.value.hint


def test_released_shapes_need_no_config() -> None:
    from gemma2tool.formats.mapping.transforms import to_disk
    from gemma2tool.formats.torch.gemma_pytorch.format import TABLE, _canonical_shapes
    from gemma2tool.model.config import SIZES, infer_from_shapes
    from gemma2tool.model.lazy import ArrayTensor

    for config in SIZES.values():
        hollow = {
            name: ArrayTensor(np.broadcast_to(np.float32(0), spec.shape))
            for name, spec in tensor_specs(config).items()
            if spec.required
        }
        disk = {entry.disk: tensor for entry, tensor in to_disk(TABLE, hollow, config)}
        inferred = infer_from_shapes(_canonical_shapes(disk))
        assert inferred.query_pre_attn_scalar == config.query_pre_attn_scalar
        assert tensor_specs(inferred).keys() == tensor_specs(config).keys()


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\x93\xc8hello")
    with pytest.raises(InputRefused, match="not a Gemma 2 checkpoint"):
        registry.detect(tmp_path / "x.bin")
    with pytest.raises(InputRefused, match="no such file"):
        registry.detect(tmp_path / "absent")
    assert not GemmaPytorch().detect(tmp_path / "x.bin")
