"""Bounds of the types that serving libraries load: correct quantizations pass, one wrong matrix of scales does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.verify.run import VerifySettings, verify
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint

CONFIG = dataclasses.replace(
    SMALL, hidden_size=128, intermediate_size=256, num_hidden_layers=1, layer_types=(), query_pre_attn_scalar=32
)
SCALES = {
    "w8a8-int8": "weight_scale",
    "w8a16": "weight_scale",
    "w4a16": "weight_scale",
    "w4a16-asym": "weight_scale",
    "fp8-dynamic": "weight_scale",
    "fp8-block": "weight_scale",
    "torchao-int8": "_weight_scale",
    "torchao-fp8": "_weight_scale",
    "torchao-int4": "_weight_scale",
    "torchao-int8-int4": "_weight_scale",
    "mlx-4": "scales",
    "mlx-8": "scales",
    "awq-4": "scales",
    "gptq-4": "scales",
    "gptq-8": "scales",
}
LEVELS = ("completeness", "tensors")


def difficult(seed: int, spread: str):
    """Weights with heavy tails, of one sign, or with a few huge values; bfloat16."""
    source = random_checkpoint(np.dtype(ml_dtypes.bfloat16), CONFIG)
    generator = np.random.default_rng(seed)
    for name, tensor in source.tensors.items():
        if len(tensor.shape) == 2:
            values = generator.standard_normal(tensor.shape)
            if spread == "tails":
                values = generator.standard_t(3, tensor.shape)
            elif spread == "one-sided":
                values = np.abs(values) + 3
            elif spread == "outliers":
                values[generator.random(tensor.shape) < 0.002] *= 50
            source.tensors[name] = ArrayTensor((0.03 * values).astype(ml_dtypes.bfloat16), origin=name)
    return source


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["normal", "tails", "one-sided", "outliers"])
@pytest.mark.parametrize("kind", sorted(SCALES))
def test_correct_quantizations_are_within_the_bounds(tmp_path: Path, kind: str, spread: str) -> None:
    source = difficult(1, spread)
    with registry.open_checkpoint(write_checkpoint(source, tmp_path / "out", type=kind)) as candidate:
        result = verify(source, candidate, VerifySettings(levels=LEVELS))
    assert result.passed, [finding.message for finding in result.failures]
    assert result.kind == kind


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(SCALES))
def test_a_matrix_with_doubled_scales_is_beyond_the_bounds(tmp_path: Path, kind: str) -> None:
    from safetensors import safe_open

    source = difficult(2, "normal")
    path = write_checkpoint(source, tmp_path / "out", type=kind)
    weights = path / "model.safetensors"
    name = f"model.layers.0.mlp.up_proj.{SCALES[kind]}"
    with safe_open(weights, "np") as file:
        assert name in file.keys()  # noqa: SIM118 (it is no dict)
    from gemma2tool.containers import safetensors

    entry = safetensors.read_header(weights).tensors[name]
    dtype = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[entry.dtype]
    content = bytearray(weights.read_bytes())
    scales = np.frombuffer(content, dtype, entry.nbytes // np.dtype(dtype).itemsize, entry.offset)
    content[entry.offset : entry.offset + entry.nbytes] = (scales * dtype(2)).astype(dtype).tobytes()
    weights.write_bytes(content)
    with registry.open_checkpoint(path) as candidate:
        result = verify(source, candidate, VerifySettings(levels=LEVELS))
    assert not result.passed
    assert any("up_proj" in str(finding.subject) + finding.message for finding in result.failures)
