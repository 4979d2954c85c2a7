"""Every quantized folder in the library it is for: the fixture, written by the pipeline, loaded and run on a CPU.

Logits are compared with the built-in forward pass over the same file, on a prompt longer than the sliding window. The
limits follow from what the consumer computes in: float32 if it follows the model, bfloat16 if its CPU kernel is written
in it, and 8-bit activations if the type has them. GPTQ and AWQ need GPTQModel, which no test environment installs by
itself (tests/gptqmodel.txt); test_quantized_sources.py tests their values without it.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma2tool.formats import registry
from gemma2tool.reference.streaming import logits
from tests.support.checkpoints import write_checkpoint
from tests.support.logits import mean_kl

pytestmark = [pytest.mark.slow, pytest.mark.peer]

LAYERS = 2  # one with a window, one without

SKIPPED = (
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.self_attn.o_proj",
)
SKIP = [r"layers\.0\.mlp", r"layers.1.self_attn.o_proj"]

# What the consumer computes in, as a limit on the mean KL from the built-in float32 forward pass. Quantization itself
# costs 3e-5 (8 bits) and 5e-3 (4 bits); a consumer that misread a type would exceed that many times over.
FLOAT32, BFLOAT16_KERNEL, BFLOAT16, ACTIVATIONS = 1e-5, 1e-4, 2e-3, 3e-3

GROUPS = ({}, {"group_size": 32}, {"group_size": -1}, {"skip": SKIP})
BITSANDBYTES = [
    *(("nf4", options, BFLOAT16) for options in ({}, {"double_quant": True}, {"skip": SKIP})),
    *(("fp4", options, BFLOAT16) for options in ({}, {"only": [r"layers\.1\."]})),
    *(("int8", options, BFLOAT16) for options in ({}, {"skip": SKIP})),
]
COMPRESSED = [
    *(("w8a16", options, FLOAT32) for options in ({}, {"group_size": -1})),
    *(("w4a16", options, FLOAT32) for options in GROUPS),
    *(("w8a8-int8", options, ACTIVATIONS) for options in ({}, {"skip": SKIP})),
    *(("fp8-dynamic", options, ACTIVATIONS) for options in ({}, {"skip": SKIP})),
    ("fp8-block", {}, ACTIVATIONS),
]
TORCHAO = [
    *(("torchao-int8", options, FLOAT32) for options in ({}, {"skip": SKIP})),
    ("torchao-int8-dynamic", {}, ACTIVATIONS),
    ("torchao-fp8", {}, BFLOAT16),
    ("torchao-fp8-dynamic", {}, ACTIVATIONS),
    ("torchao-int4", {"group_size": 32}, FLOAT32),
    ("torchao-int8-int4", {}, ACTIVATIONS),
]
MLX = [f"mlx-{bits}" for bits in (2, 3, 4, 5, 6, 8)]
MLX_FLOATS = ["mlx-nvfp4", "mlx-mxfp4", "mlx-mxfp8"]
IN_BFLOAT16 = ["nvfp4a16", "mxfp4a16", "mxfp8a16"]
"""Types of compressed-tensors whose weights it unpacks to bfloat16."""
GPTQ = [
    *(
        ("gptq-4", options, BFLOAT16_KERNEL)
        for options in (
            {},
            {"group_size": 32},
            {"gptq_format": "gptq_v2"},
            {"symmetric": False},
            {"symmetric": False, "gptq_format": "gptq_v2"},
            {"skip": SKIP},
        )
    ),
    *(("gptq-8", options, FLOAT32) for options in (*GROUPS, {"symmetric": False}, {"gptq_format": "gptq_v2"})),
    *(("awq-4", options, BFLOAT16_KERNEL) for options in ({}, {"group_size": 64}, {"skip": SKIP})),
]


def check(source, ids: np.ndarray, path: Path, type_name: str, options: dict, limit: float, **load) -> torch.nn.Module:
    """Write the folder, load it with transformers (in float32 by default), compare; returns the consumer's model."""
    from transformers import AutoModelForCausalLM

    write_checkpoint(source, path, type=type_name, **options)
    model, info = AutoModelForCausalLM.from_pretrained(
        path,
        **{"dtype": torch.float32, **load},
        attn_implementation="eager",
        device_map="cpu",
        output_loading_info=True,
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        consumer_logits = model(torch.from_numpy(ids)).logits.float().numpy()
    with registry.open_checkpoint(path) as checkpoint:
        assert mean_kl(logits(checkpoint, ids), consumer_logits) < limit
    return model


def layer_classes(model: torch.nn.Module) -> tuple[set[type], set[type]]:
    """The classes of the layers that were to stay unquantized, and of the others."""
    layers = {
        name: type(module)
        for name, module in model.named_modules()
        if name.startswith("model.layers.") and name.endswith("_proj")
    }
    return {layers[name] for name in SKIPPED}, {kind for name, kind in layers.items() if name not in SKIPPED}


@pytest.mark.parametrize(("type_name", "options", "limit"), BITSANDBYTES, ids=str)
def test_bitsandbytes(source, ids, tmp_path: Path, type_name: str, options: dict, limit: float) -> None:
    pytest.importorskip("bitsandbytes")
    model = check(source, ids, tmp_path / "out", type_name, options, limit)
    assert type(model.lm_head) is torch.nn.Linear
    if "skip" in options:
        unquantized, quantized = layer_classes(model)
        assert unquantized == {torch.nn.Linear} and torch.nn.Linear not in quantized


@pytest.mark.parametrize(("type_name", "options", "limit"), COMPRESSED, ids=str)
def test_compressed_tensors(source, ids, tmp_path: Path, type_name: str, options: dict, limit: float) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model = check(source, ids, tmp_path / "out", type_name, options, limit)
    quantized = {name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    assert "lm_head" not in quantized
    assert bool(quantized.isdisjoint(SKIPPED)) is ("skip" in options)


@pytest.mark.parametrize("type_name", IN_BFLOAT16)
def test_compressed_tensors_of_float_codes(source, ids, tmp_path: Path, type_name: str) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    check(source, ids, tmp_path / "out", type_name, {}, BFLOAT16, dtype=torch.bfloat16)


@pytest.mark.parametrize("type_name", ["w4a16", "w4a16-asym", "w8a16", "w8a8-int8", "fp8-dynamic", "fp8-block"])
def test_compressed_tensors_decompresses_to_the_same_values(source, ids, tmp_path: Path, type_name: str) -> None:
    """Every weight, bit for bit. transformers loads the asymmetric type only like this (5.23 expects other zero
    points).
    """
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    path = write_checkpoint(source, tmp_path / "out", type=type_name)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.bfloat16,
        device_map="cpu",
        quantization_config=CompressedTensorsConfig(dequantize=True),
        attn_implementation="eager",
    )
    weights = model.state_dict()
    with registry.open_checkpoint(path) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            assert np.array_equal(tensor.load_rows_f32(0, tensor.rows), weights[name].float().numpy()), name
        with torch.no_grad():
            consumer_logits = model.float()(torch.from_numpy(ids)).logits.numpy()
        assert mean_kl(logits(checkpoint, ids), consumer_logits) < 1e-9


@pytest.mark.parametrize(("type_name", "options", "limit"), TORCHAO, ids=str)
def test_torchao(source, ids, tmp_path: Path, type_name: str, options: dict, limit: float) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    int4_on_a_processor()
    in_own_dtype = type_name in ("torchao-fp8", "torchao-fp8-dynamic", "torchao-int8-int4")
    load = {"dtype": torch.bfloat16} if in_own_dtype else {}
    model = check(source, ids, tmp_path / "out", type_name, options, limit, **load)
    with registry.open_checkpoint(tmp_path / "out") as checkpoint:
        for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
            weight = model.get_parameter(name)
            quantized = type(weight.data).__name__.endswith("Tensor") and type(weight.data) is not torch.Tensor
            assert quantized is not ("skip" in options and name.startswith("model.layers.0.mlp"))
            if type_name != "torchao-int4":
                values = weight.dequantize() if quantized else weight
                assert torch.equal(
                    values.to(torch.bfloat16).float(),
                    torch.from_numpy(checkpoint.tensors[name].load_rows_f32(0, weight.shape[0])),
                )


@functools.cache
def int4_on_a_processor() -> torch.library.Library:
    """mslk's product of activations and packed int4, which it has for GPUs only, with the same arguments."""

    def product(x, codes, scales, zero_points):
        weight = torch.stack([codes << 4 >> 4, codes >> 4], -1).flatten(1).unflatten(1, (len(scales), -1)).float()
        return x.float() @ (weight * scales.T[..., None].float() + zero_points.T[..., None].float()).flatten(1).T

    library = torch.library.Library("mslk", "FRAGMENT")
    library.define("bf16i4bf16_rowwise(Tensor x, Tensor codes, Tensor scales, Tensor zero_points) -> Tensor")
    library.impl("bf16i4bf16_rowwise", product, "CPU")
    return library


@pytest.mark.parametrize(("type_name", "options", "limit"), GPTQ, ids=str)
def test_gptqmodel(source, ids, tmp_path: Path, type_name: str, options: dict, limit: float) -> None:
    pytest.importorskip("gptqmodel", reason="GPTQModel is not installed: pip install --no-deps -r tests/gptqmodel.txt")
    model = check(source, ids, tmp_path / "out", type_name, options, limit)
    unquantized, quantized = layer_classes(model)
    assert torch.nn.Linear not in quantized and (unquantized == {torch.nn.Linear}) is ("skip" in options)


@pytest.mark.parametrize(
    ("type_name", "options"),
    [
        *((name, options) for name in MLX for options in ({}, {"skip": ["embed_tokens"]})),
        *(("mlx-4", options) for options in ({"group_size": 32}, {"skip": SKIP})),
        *((name, {}) for name in MLX_FLOATS),
    ],
    ids=str,
)
def test_mlx(source, ids, tmp_path: Path, type_name: str, options: dict) -> None:
    """Within the window, because mlx-lm has none; in float32, because its own dequantization rounds to bfloat16."""
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    import mlx.core as mx

    ids = ids[:, : source.config.sliding_window]
    path = write_checkpoint(source, tmp_path / "out", type=type_name, **options)
    with mx.stream(mx.cpu):
        model, _ = mlx_lm.utils.load_model(path)
        model.set_dtype(mx.float32)  # of scales and biases too: their values stay the same
        consumer_logits = np.array(model(mx.array(ids)).astype(mx.float32))
    with registry.open_checkpoint(path) as checkpoint:
        assert mean_kl(logits(checkpoint, ids), consumer_logits) < 1e-4


def test_every_type_has_a_consumer() -> None:
    from gemma2tool.formats import packings

    tested = {case[0] for case in (*BITSANDBYTES, *COMPRESSED, *TORCHAO, *GPTQ)} | {
        *MLX,
        *MLX_FLOATS,
        *IN_BFLOAT16,
        "w4a16-asym",
        "w4afp8",  # beside other types, in formats/packings/test_mixed.py
    }
    assert tested == set(packings.TYPES)


def test_gptq_writes_the_same_config_into_both_files(source, tmp_path: Path) -> None:
    """GPTQModel and AutoGPTQ read quantize_config.json first, others config.json; vLLM's fast kernel reads four
    fields.
    """
    path = write_checkpoint(source, tmp_path / "out", type="gptq-4", symmetric=False, gptq_format="gptq_v2", skip=SKIP)
    inside = json.loads((path / "config.json").read_text())["quantization_config"]
    assert json.loads((path / "quantize_config.json").read_text()) == inside
    assert {"bits": 4, "group_size": 128, "sym": False, "desc_act": False}.items() <= inside.items()
    assert inside["checkpoint_format"] == inside["format"] == "gptq_v2" and inside["lm_head"] is False
    assert len(inside["dynamic"]) == len(SKIPPED) and all(key.startswith("-:^") for key in inside["dynamic"])
