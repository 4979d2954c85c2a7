"""Every quantized folder in the library it is for: the fixture, written by the pipeline, loaded and run on a CPU by its
own consumer.

Logits are held to our forward pass over the same file, on a prompt longer than the sliding window, within what the
consumer computes with: float32 where it follows the model, bfloat16 where its CPU kernel is written in it, and 8-bit
activations where the type has them. GPTQ and AWQ need GPTQModel, which no test environment gets by itself
(tests/gptqmodel.txt); what they mean is tested without it in test_packing_formulas.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma2tool.formats import registry
from gemma2tool.reference.streaming import logits
from tests.end_to_end.test_main_job import mean_kl
from tests.support.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

LENGTH = 150  # the fixture's window is 64
SKIPPED = (
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.3.self_attn.o_proj",
)
SKIP = [r"layers\.0\.mlp", r"layers.3.self_attn.o_proj"]

# What the consumer computes in, as a limit on the mean KL from our float32 forward pass. The types' own losses, which a
# consumer that misreads them would exceed many times over, are 3e-5 (8 bits) and 5e-3 (4 bits).
FLOAT32, BFLOAT16_KERNEL, BFLOAT16, ACTIVATIONS = 1e-5, 1e-4, 2e-3, 3e-3

GROUPS = ({}, {"group_size": 32}, {"group_size": -1}, {"skip": SKIP})
BITSANDBYTES = [
    *(("nf4", each, BFLOAT16) for each in ({}, {"double_quant": True}, {"skip": SKIP})),
    *(("fp4", each, BFLOAT16) for each in ({}, {"only": [r"layers\.[1-5]\."]})),
    *(("int8", each, BFLOAT16) for each in ({}, {"skip": SKIP})),
]
COMPRESSED = [
    *(("w8a16", each, FLOAT32) for each in ({}, {"group_size": -1})),
    *(("w4a16", each, FLOAT32) for each in GROUPS),
    *(("w8a8-int8", each, ACTIVATIONS) for each in ({}, {"skip": SKIP})),
    *(("fp8-dynamic", each, ACTIVATIONS) for each in ({}, {"skip": SKIP})),
    ("fp8-block", {}, ACTIVATIONS),
]
TORCHAO = [("torchao-int8", each, FLOAT32) for each in ({}, {"skip": SKIP})]
GPTQ = [
    *(
        ("gptq-4", each, BFLOAT16_KERNEL)
        for each in (
            {},
            {"group_size": 32},
            {"gptq_format": "gptq_v2"},
            {"symmetric": False},
            {"symmetric": False, "gptq_format": "gptq_v2"},
            {"skip": SKIP},
        )
    ),
    *(("gptq-8", each, FLOAT32) for each in (*GROUPS, {"symmetric": False}, {"gptq_format": "gptq_v2"})),
    *(("awq-4", each, BFLOAT16_KERNEL) for each in ({}, {"group_size": 64}, {"skip": SKIP})),
]


@pytest.fixture(scope="module")
def source(fixture_dir: Path) -> Iterator:
    with registry.open_checkpoint(fixture_dir / "model.ckpt") as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def ids(fixture_dir: Path) -> np.ndarray:
    return np.load(fixture_dir / "heldout.npy")[:1, :LENGTH].astype(np.int64)


def check(source, ids: np.ndarray, path: Path, type_name: str, options: dict, limit: float, **load) -> torch.nn.Module:
    """Write the folder, load it with transformers in float32, and compare; returns the consumer's model."""
    from transformers import AutoModelForCausalLM

    write_checkpoint(source, path, type=type_name, **options)
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", device_map="cpu", output_loading_info=True, **load
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)).logits.float().numpy()
    with registry.open_checkpoint(path) as ours:
        assert mean_kl(logits(ours, ids), theirs) < limit
    return model


def kinds(model: torch.nn.Module) -> tuple[set[type], set[type]]:
    """The classes of the layers that were to be left alone, and of the others."""
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
        left, quantized = kinds(model)
        assert left == {torch.nn.Linear} and torch.nn.Linear not in quantized


@pytest.mark.parametrize(("type_name", "options", "limit"), COMPRESSED, ids=str)
def test_compressed_tensors(source, ids, tmp_path: Path, type_name: str, options: dict, limit: float) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model = check(source, ids, tmp_path / "out", type_name, options, limit)
    quantized = {name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    assert "lm_head" not in quantized
    assert bool(quantized.isdisjoint(SKIPPED)) is ("skip" in options)


@pytest.mark.parametrize("type_name", ["w4a16", "w4a16-asym", "w8a16", "w8a8-int8", "fp8-dynamic", "fp8-block"])
def test_compressed_tensors_decompresses_to_our_values(source, ids, tmp_path: Path, type_name: str) -> None:
    """Every weight, bit for bit; the only way in which transformers loads the asymmetric type (5.23 expects other zero
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
    theirs = model.state_dict()
    with registry.open_checkpoint(path) as ours:
        for name, tensor in ours.tensors.items():
            assert np.array_equal(tensor.load_rows_f32(0, tensor.rows), theirs[name].float().numpy()), name
        with torch.no_grad():
            found = model.float()(torch.from_numpy(ids)).logits.numpy()
        assert mean_kl(logits(ours, ids), found) < 1e-9


@pytest.mark.parametrize(("type_name", "options", "limit"), TORCHAO, ids=str)
def test_torchao(source, ids, tmp_path: Path, type_name: str, options: dict, limit: float) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    model = check(source, ids, tmp_path / "out", type_name, options, limit)
    with registry.open_checkpoint(tmp_path / "out") as ours:
        for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.5.self_attn.k_proj.weight"):
            weight = model.get_parameter(name)
            quantized = type(weight.data).__name__ == "Int8Tensor"
            assert quantized is not ("skip" in options and name.startswith("model.layers.0.mlp"))
            values = weight.dequantize() if quantized else weight
            assert torch.equal(
                values.to(torch.bfloat16).float(),
                torch.from_numpy(ours.tensors[name].load_rows_f32(0, weight.shape[0])),
            )


@pytest.mark.parametrize(("type_name", "options", "limit"), GPTQ, ids=str)
def test_gptqmodel(source, ids, tmp_path: Path, type_name: str, options: dict, limit: float) -> None:
    pytest.importorskip("gptqmodel", reason="GPTQModel is not installed: pip install --no-deps -r tests/gptqmodel.txt")
    model = check(source, ids, tmp_path / "out", type_name, options, limit)
    left, quantized = kinds(model)
    assert torch.nn.Linear not in quantized and (left == {torch.nn.Linear}) is ("skip" in options)


@pytest.mark.parametrize("options", [{}, {"group_size": 32}, {"skip": SKIP}, {"skip": ["embed_tokens"]}], ids=str)
@pytest.mark.parametrize("type_name", ["mlx-4", "mlx-8"])
def test_mlx(source, ids, tmp_path: Path, type_name: str, options: dict) -> None:
    """Within the window, because mlx-lm has none. In float32 it does not round code * scale to bfloat16, as its own
    dequantization does.
    """
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    import mlx.core as mx

    ids = ids[:, : source.config.sliding_window]
    path = write_checkpoint(source, tmp_path / "out", type=type_name, **options)
    with mx.stream(mx.cpu):
        model, _ = mlx_lm.utils.load_model(path)
        model.set_dtype(mx.float32)  # of scales and biases, too: what they hold stays, what is computed is float32
        theirs = np.array(model(mx.array(ids)).astype(mx.float32))
    with registry.open_checkpoint(path) as ours:
        assert mean_kl(logits(ours, ids), theirs) < 1e-4


def test_every_type_has_a_consumer() -> None:
    from gemma2tool.formats import packings

    tested = {case[0] for case in (*BITSANDBYTES, *COMPRESSED, *TORCHAO, *GPTQ)} | {"mlx-4", "mlx-8", "w4a16-asym"}
    assert tested == set(packings.TYPES)


def test_gptq_says_the_same_in_both_files(source, tmp_path: Path) -> None:
    """GPTQModel and AutoGPTQ read quantize_config.json first, the others config.json; vLLM's fast kernel asks for four
    fields.
    """
    path = write_checkpoint(source, tmp_path / "out", type="gptq-4", symmetric=False, gptq_format="gptq_v2", skip=SKIP)
    inside = json.loads((path / "config.json").read_text())["quantization_config"]
    assert json.loads((path / "quantize_config.json").read_text()) == inside
    assert {"bits": 4, "group_size": 128, "sym": False, "desc_act": False}.items() <= inside.items()
    assert inside["checkpoint_format"] == inside["format"] == "gptq_v2" and inside["lm_head"] is False
    assert len(inside["dynamic"]) == len(SKIPPED) and all(key.startswith("-:^") for key in inside["dynamic"])
