"""MLX folders, compared with folders that mlx-lm saved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import registry
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import assert_same_tensors, assert_true_logits, refused, truth_of, write_as

READ_BY_MLX = {
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "head_dim",
    "rms_norm_eps",
    "vocab_size",
    "num_key_value_heads",
    "rope_theta",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.oracle
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


@pytest.mark.oracle
def test_same_files_as_mlx_lm(oracles: Path, tmp_path: Path) -> None:
    """The index and the tensors are equal; config.json has all that mlx-lm's has, and more."""
    from safetensors import safe_open

    saved = oracles / "checkpoints" / "mlx" / "hd"
    written = write_as("mlx", registry.open_checkpoint(saved), tmp_path / "out")
    assert read_json(written / "model.safetensors.index.json") == read_json(saved / "model.safetensors.index.json")
    with safe_open(written / "model.safetensors", "np") as a, safe_open(saved / "model.safetensors", "np") as b:
        assert a.metadata() == b.metadata() == {"format": "mlx"}
        assert sorted(a.keys()) == sorted(b.keys())
        for name in sorted(b.keys()):
            assert np.array_equal(a.get_tensor(name), b.get_tensor(name)), name
    config, expected = read_json(written / "config.json"), read_json(saved / "config.json")
    assert {key: config[key] for key in READ_BY_MLX} == {key: expected[key] for key in READ_BY_MLX}


@pytest.mark.slow
@pytest.mark.peer
def test_mlx_lm_computes_the_same_within_its_window(tmp_path: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    import mlx.core as mx

    from gemma2tool.reference.streaming import logits

    source = random_checkpoint(np.dtype(np.float32))
    folder = write_as("mlx", source, tmp_path / "out")
    model, _ = mlx_lm.utils.load_model(folder)
    ids = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, SMALL.sliding_window))
    expected = np.array(model(mx.array(ids)).astype(mx.float32))
    difference = np.abs(logits(source, ids) - expected)
    assert (difference <= 1e-4 + 1e-5 * np.abs(expected)).all(), difference.max()


def test_warnings_and_refusals(tmp_path: Path) -> None:
    untied = random_checkpoint(np.dtype(np.float32), replace(SMALL, tie_word_embeddings=False))
    from gemma2tool.formats.base import WriteOptions

    warnings = registry.by_name("mlx").layout(untied, WriteOptions()).warnings
    assert any("sliding window" in line for line in warnings) and any("lm_head" in line for line in warnings)
    folder = write_as("mlx", random_checkpoint(np.dtype(np.float32)), tmp_path / "out")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../model.safetensors"
    index.write_text(json.dumps(content))
    with refused("not a plain file name"):
        registry.by_name("mlx").open(folder)


# -- affine quantization -----------------------------------------------------------------------------------------------


def _stored(folder: Path) -> dict[str, tuple]:
    import torch
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    return {
        name: (str(tensor.dtype), tuple(tensor.shape), tensor.flatten().view(dtype=torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def raw_tensors(path: Path) -> dict[str, np.ndarray]:
    from gemma2tool.formats.mapping import container_tensors

    return {name: tensor.load() for name, tensor in container_tensors.open_safetensors([path], [])[0].items()}


QUANTIZED = [("hf/hd", "mlx/hd_q4", "mlx-4", 32), ("../quantized/source", "../quantized/mlx-q4", "mlx-4", 64)]


@pytest.mark.oracle
@pytest.mark.parametrize(("source", "saved", "kind", "group_size"), QUANTIZED)
def test_quantized_bytes_equal_mlx_lm(
    oracles: Path, tmp_path: Path, source: str, saved: str, kind: str, group_size: int
) -> None:
    folder = oracles / "checkpoints"
    written = write_as(
        "mlx", registry.open_checkpoint(folder / source), tmp_path / "out", type=kind, group_size=group_size
    )
    assert _stored(written) == _stored(folder / saved)
    config = read_json(written / "config.json")
    expected = read_json(folder / saved / "config.json")["quantization"]
    assert config["quantization"] == config["quantization_config"] == expected


@pytest.mark.oracle
@pytest.mark.parametrize(("source", "saved", "kind", "group_size"), QUANTIZED)
def test_quantized_oracles_are_read(
    oracles: Path, tmp_path: Path, source: str, saved: str, kind: str, group_size: int
) -> None:
    checkpoint = registry.open_checkpoint(oracles / "checkpoints" / saved)
    assert checkpoint.format == "mlx" and "quantization" not in checkpoint.config.extra
    original = registry.open_checkpoint(oracles / "checkpoints" / source)
    parts = raw_tensors(oracles / "checkpoints" / saved / "model.safetensors")
    quantized = [name.removesuffix(".scales") for name in parts if name.endswith(".scales")]
    assert quantized
    for name, tensor in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if module not in quantized:
            assert np.array_equal(tensor.load(), original.tensors[name].load()), name
            continue
        words, scales, biases = (parts[f"{module}.{suffix}"] for suffix in ("weight", "scales", "biases"))
        codes = (words[:, :, None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
        grouped = codes.reshape(len(words), -1, group_size).astype(np.float32)
        products = grouped * scales.astype(np.float32)[..., None]
        values = products + biases.astype(np.float32)[..., None]
        # mlx rounds the product and the sum to the dtype of the scales, each by half a unit in the last place.
        unit = 2.0 ** (-8 if scales.dtype.itemsize == 2 else -24)
        bound = ((np.abs(products) + np.abs(values)) * (1.01 * unit)).reshape(tensor.shape)
        assert (np.abs(tensor.load().astype(np.float32) - values.reshape(tensor.shape)) <= bound).all(), name
    plain = write_as("hf", checkpoint, tmp_path / "plain")
    assert_same_tensors(checkpoint, registry.open_checkpoint(plain))


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_mlx_itself_quantizes_to_the_same_values(tmp_path: Path, bits: int, group_size: int) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    config = replace(SMALL, hidden_size=128, intermediate_size=256)
    source = random_checkpoint(np.dtype(np.float32), config)
    folder = write_as("mlx", source, tmp_path / "out", type=f"mlx-{bits}", group_size=group_size)
    stored = mx.load(str(folder / "model.safetensors"))
    for name in ("model.embed_tokens", "model.layers.1.mlp.down_proj", "model.layers.2.self_attn.q_proj"):
        parts = mx.quantize(mx.array(source.tensors[name + ".weight"].load()), group_size=group_size, bits=bits)
        for suffix, part in zip(("weight", "scales", "biases"), parts, strict=True):
            assert mx.array_equal(stored[f"{name}.{suffix}"], part).item(), (name, suffix)
        values = registry.open_checkpoint(folder).tensors[name + ".weight"].load()
        expected = np.array(mx.dequantize(*parts, group_size=group_size, bits=bits))
        assert np.abs(values - expected).max() <= 1e-6


def test_types_and_groups_that_mlx_lacks_are_refused(tmp_path: Path) -> None:
    source = random_checkpoint(np.dtype(np.float32))
    with refused("cannot hold nf4"):
        write_as("mlx", source, tmp_path / "a", type="nf4")
    with refused("no groups of 48"):
        write_as("mlx", source, tmp_path / "b", type="mlx-4", group_size=48)
