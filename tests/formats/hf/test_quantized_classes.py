"""Quantized classifiers, reward models and base models: transformers loads what gemma2tool writes, heads unquantized,
and gemma2tool reads and accepts what transformers writes, heads quantized.

The threads: vllm 11803 and 35849, sglang 1954, unsloth-zoo 161.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

from gemma2tool.formats import registry
from gemma2tool.formats.packings import listed
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.verify.compare.completeness import compare_names
from tests.support.checkpoints import random_checkpoint
from tests.support.formats import assert_same_tensors, write_as

pytestmark = pytest.mark.peer

KINDS = ("Gemma2ForSequenceClassification", "Gemma2ForTokenClassification", "Gemma2Model")
SKIP = ["layers.1.mlp.down_proj"]
TYPES = [
    *(
        (type, [])
        for type in ("nf4", "int8", "w8a8-int8", "w8a16", "w4a16", "fp8-dynamic", "fp8-block", "torchao-int8")
    ),
    *((type, SKIP) for type in ("nf4", "w4a16", "torchao-int8")),
]
ERROR = 0.25
"""How far a quantized model may be from its source, as a fraction of the largest value; 8 bits: up to 0.07."""


def _model(kind: str):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=64,
        sliding_window=8,
        initializer_range=0.1,
        num_labels=3,
        dtype="bfloat16",
    )
    model = getattr(transformers, kind)(config).to(torch.bfloat16).eval()
    if hasattr(model, "score"):
        model.score.weight.data.normal_(0, 0.1)
    return model


def _output(model) -> np.ndarray:
    import torch

    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 96, (1, 70)))
    with torch.no_grad():
        output = model(ids)
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state).float().numpy()


@pytest.fixture(scope="module", params=KINDS)
def source(request, fixture_dir: Path, tmp_path_factory) -> Path:
    """The trained fixture as a model of another class, with a head of random numbers if the class has one."""
    checkpoint = registry.open_checkpoint(fixture_dir / "model.ckpt")
    labels = {index: f"LABEL_{index}" for index in range(3)}
    checkpoint.config = dataclasses.replace(checkpoint.config, architectures=(request.param,), id2label=labels)
    values = np.random.default_rng(0).standard_normal((3, checkpoint.config.hidden_size)) * 0.05
    if request.param != "Gemma2Model":
        checkpoint.tensors["score.weight"] = ArrayTensor(values.astype(ml_dtypes.bfloat16))
    if "Token" in request.param:
        checkpoint.tensors["score.bias"] = ArrayTensor(np.ones(3, ml_dtypes.bfloat16))
    return write_as("hf", checkpoint, tmp_path_factory.mktemp("source") / request.param)


@pytest.mark.slow
@pytest.mark.parametrize(("type", "skip"), TYPES)
def test_transformers_loads_every_type_of_every_class(source: Path, tmp_path: Path, type: str, skip: list) -> None:
    import transformers

    folder = write_as("hf", registry.open_checkpoint(source), tmp_path / "out", type=type, skip=skip)
    assert not registry.open_checkpoint(folder).misread
    kind = getattr(transformers, source.name)
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = _output(kind.from_pretrained(source))
    assert np.abs(_output(model.eval()) - expected).max() / np.abs(expected).max() < ERROR


@pytest.mark.slow
def test_the_base_class_is_written_as_transformers_writes_it(tmp_path: Path) -> None:
    """Without "model." in the names, byte for byte."""
    _model("Gemma2Model").save_pretrained(tmp_path / "source")
    folder = write_as("hf", registry.open_checkpoint(tmp_path / "source"), tmp_path / "out")
    name = "model.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    folder = write_as("hf-bin", registry.open_checkpoint(tmp_path / "source"), tmp_path / "bin")
    assert_same_tensors(registry.open_checkpoint(tmp_path / "source"), registry.open_checkpoint(folder))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_head_that_transformers_quantized_is_no_fault(tmp_path: Path, bits: int) -> None:
    """A token classifier's head is quantized by transformers' default, a reward model's by a list without it."""
    from transformers import AutoModelForTokenClassification, BitsAndBytesConfig

    model = _model("Gemma2ForTokenClassification")
    model.save_pretrained(tmp_path / "source")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    quantized = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "source", quantization_config=BitsAndBytesConfig(**options), dtype="bfloat16"
    )
    quantized.save_pretrained(tmp_path / "quantized")
    candidate = registry.open_checkpoint(tmp_path / "quantized")
    assert candidate.tensors["score.weight"].stored in ("nf4", "int8")
    assert compare_names(registry.open_checkpoint(tmp_path / "source"), candidate).status == "passed"


@pytest.mark.slow
@pytest.mark.parametrize("type", ["nf4", "w4a16"])
def test_an_unlisted_head_is_an_error(tmp_path: Path, type: str) -> None:
    """transformers (5.23) stops at it (bitsandbytes) or computes with scales from nowhere (compressed-tensors)."""
    _model("Gemma2ForTokenClassification").save_pretrained(tmp_path / "source")
    source = registry.open_checkpoint(tmp_path / "source")
    folder = write_as("hf", source, tmp_path / "out", type=type)
    assert compare_names(source, registry.open_checkpoint(folder)).status == "passed"
    config = json.loads((folder / "config.json").read_text())
    key = {"nf4": "llm_int8_skip_modules", "w4a16": "ignore"}[type]
    config["quantization_config"][key].remove("score")
    (folder / "config.json").write_text(json.dumps(config))
    candidate = registry.open_checkpoint(folder)
    assert any("score" in warning for warning in candidate.all_warnings)
    result = compare_names(source, candidate)
    assert result.status == "failed" and "config.json does not list score" in result.summary


@pytest.mark.slow
def test_a_quantization_config_that_a_merge_left_behind(tmp_path: Path) -> None:
    """Merged 16-bit weights beside the 4-bit base's entry: transformers stops at them. One finding; outputs lack it."""
    from gemma2tool.cli.main import app

    source = random_checkpoint(np.dtype(ml_dtypes.bfloat16))
    folder = write_as("hf", source, tmp_path / "merged")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    merged = registry.open_checkpoint(folder)
    assert len(merged.misread) == 1 and any("remove that entry" in warning for warning in merged.all_warnings)
    assert compare_names(source, merged).status == "failed"
    result = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 0, result.output
    back = registry.open_checkpoint(tmp_path / "out")
    assert not back.misread and "quantization_config" not in back.config.to_hf()
    assert_same_tensors(source, back)


@pytest.mark.slow
def test_lists_as_transformers_matches_them() -> None:
    quantizers = pytest.importorskip("transformers.quantizers.quantizers_utils")
    modules = ["score", "lm_head", "model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj"]
    patterns = ["score", "core", "layers.1", "model.layers.1", "model.layers.*.mlp", r".*\.11\.", "up_proj", "mlp.up"]
    for pattern in patterns:
        kept = {module for module in modules if not quantizers.should_convert_module(module, [pattern])}
        assert listed.skipped(modules, [pattern]) == kept, pattern
    hostile = r"(m|mo|o)*(\w+\w+)+$"
    assert listed.skipped(modules, [hostile]) == set(modules)  # not run; what could match counts as listed
    assert listed.skipped(modules, None) == listed.skipped(modules, [3]) == set()


def test_lists_as_compressed_tensors_matches_them() -> None:
    modules = ["score", "model.layers.0.mlp.up_proj"]
    group = {"config_groups": {"group_0": {"targets": ["Linear"]}}}
    assert listed.compressed(modules, group | {"ignore": ["lm_head"]}) == modules
    assert listed.compressed(modules, group | {"ignore": ["re:.*score", "re:.*up_proj$"]}) == []
    only = {"config_groups": {"group_0": {"targets": ["re:.*mlp.*"]}}, "ignore": []}
    assert listed.compressed(modules, only) == modules[1:]
    assert listed.compressed(modules, {}) == []
