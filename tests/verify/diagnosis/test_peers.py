"""Mistakes made with files of other programs: what a reader that ignores their conventions would read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.format_facts import FormatFacts
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.verify.diagnosis.counterfactual import counterfactual
from gemma2tool.verify.result import Verification
from gemma2tool.verify.run import VerifySettings, verify

pytestmark = pytest.mark.oracle

LEVELS = ("completeness", "config", "tensors")


def verify_with(
    source: Checkpoint, arrays: dict[str, np.ndarray], stored: dict[str, str] | None = None
) -> Verification:
    """Verify ``source`` with some of its tensors replaced by ``arrays``."""
    tensors = dict(source.tensors) | {
        name: ArrayTensor(np.ascontiguousarray(array), stored=(stored or {}).get(name))
        for name, array in arrays.items()
    }
    return verify(
        source,
        Checkpoint(Path("mistaken"), FormatFacts("memory"), source.config, tensors),
        VerifySettings(levels=LEVELS),
    )


def ids(result: Verification) -> list[str]:
    return [cause.id for cause in result.causes]


def test_norms_of_a_gguf_read_without_conversion(oracles: Path) -> None:
    """convert_hf_to_gguf.py writes w + 1."""
    reader = pytest.importorskip("gguf").GGUFReader(oracles / "checkpoints" / "gguf" / "hd.gguf")
    raw = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    kinds = {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    norms = {
        f"model.layers.{i}.{kind}.weight": raw[f"blk.{i}.{gguf_kind}.weight"]
        for gguf_kind, kind in kinds.items()
        for i in range(4)
    }
    norms["model.norm.weight"] = raw["output_norm.weight"]
    with registry.open_checkpoint(oracles / "checkpoints" / "hf" / "hd") as source:
        result = verify_with(source, norms)
    assert ids(result) == ["norm.plus-one"]
    assert result.causes[0].message.startswith("all 17 norm weights are larger by")


def test_queries_and_keys_of_torchtune_read_without_conversion(oracles: Path) -> None:
    """torchtune rotates interleaved pairs."""
    torch = pytest.importorskip("torch")
    file = next((oracles / "checkpoints" / "torchtune" / "27b").glob("*.pt"))
    raw = torch.load(file, weights_only=True)
    raw = raw.get("model", raw)
    read = {}
    for i in range(4):
        for kind in ("q_proj", "k_proj"):
            read[f"model.layers.{i}.self_attn.{kind}.weight"] = raw[f"layers.{i}.attn.{kind}.weight"].float().numpy()
    with registry.open_checkpoint(oracles / "checkpoints" / "hf" / "27b") as source:
        result = verify_with(source, read)
        assert ids(result) == ["rope.interleaved"]
        assert len(result.causes[0].tensors) == 8
        only = verify_with(source, {name: array for name, array in read.items() if "q_proj" in name})
        assert ids(only) == ["rope.interleaved"] and len(only.causes[0].tensors) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), [("gq-gptq4", 4), ("gq-gptq4-desc", 4), ("gq-gptq8", 8)])
@pytest.mark.parametrize("by", [1, -1])
def test_zero_points_of_gptqmodel_read_by_the_other_convention(oracles: Path, name: str, bits: int, by: int) -> None:
    """Calibrated codes, as GPTQModel wrote them, with z one off."""
    safetensors = pytest.importorskip("safetensors")
    folder = oracles / "quantized" / name
    arrays, stored = {}, {}
    with (
        registry.open_checkpoint(oracles / "quantized" / "source") as source,
        registry.open_checkpoint(folder) as quantized,
        safetensors.safe_open(folder / "model.safetensors", "np") as raw,
    ):
        assert verify(source, quantized, VerifySettings(levels=LEVELS)).passed
        for name_of_tensor, tensor in quantized.tensors.items():
            scales = name_of_tensor.removesuffix("weight") + "scales"
            if scales in raw.keys():  # noqa: SIM118 (not a mapping)
                groups = raw.get_tensor(name_of_tensor.removesuffix("weight") + "g_idx")
                step = raw.get_tensor(scales).astype(np.float32)[groups].T
                arrays[name_of_tensor], stored[name_of_tensor] = (
                    tensor.load_rows_f32(0, tensor.rows) + by * step,
                    tensor.stored,
                )
        result = verify_with(source, arrays, stored)
    assert ids(result) == ["quant.zero-point"]
    assert len(result.causes[0].tensors) == 28 and result.causes[0].evidence["bits"] == bits


@pytest.mark.slow
def test_a_damaged_absmax_of_bitsandbytes(oracles: Path, tmp_path: Path) -> None:
    """One bit of one scale's exponent, in the file."""
    folder = tmp_path / "bnb-nf4"
    shutil.copytree(oracles / "quantized" / "bnb-nf4", folder)
    file = folder / "model.safetensors"
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    name = "model.layers.2.mlp.up_proj.weight"
    start = 8 + length + json.loads(data[8 : 8 + length])[f"{name}.absmax"]["data_offsets"][0]
    data[start + 4 * 100 + 3] ^= 1  # the 101st scale, multiplied or divided by four
    file.write_bytes(data)
    with (
        registry.open_checkpoint(oracles / "quantized" / "source") as source,
        registry.open_checkpoint(folder) as candidate,
    ):
        result = verify(source, candidate, VerifySettings(levels=LEVELS))
    assert ids(result) == ["quant.absmax-damaged"]
    cause = result.causes[0]
    assert cause.tensors == (name,) and cause.evidence["blocks"] == 1 and cause.evidence["first"] == 100


@pytest.mark.slow
def test_the_query_scale_of_llama_cpp(oracles: Path) -> None:
    """llama.cpp recognizes a 27B by its 46 layers; with fewer layers it scales queries by head_dim, which its logits
    show."""
    prompt = np.load(oracles / "checkpoints" / "ids.npy")
    logits = np.load(oracles / "checkpoints" / "gguf" / "27b.llama_cpp_logits.npy")
    with registry.open_checkpoint(oracles / "checkpoints" / "hf" / "27b") as source:
        cause = counterfactual(source, prompt[0], logits.reshape(*prompt.shape, -1)[0], threads=1)
        assert cause is not None and cause.id == "config.query-scale"
        assert "head_dim" in cause.message and cause.evidence["query_pre_attn_scalar.candidate"] == 16


@pytest.mark.slow
def test_correct_logits_have_no_cause(oracles: Path) -> None:
    prompt = np.load(oracles / "checkpoints" / "ids.npy")
    logits = np.load(oracles / "checkpoints" / "gguf" / "hd.llama_cpp_logits.npy")
    with registry.open_checkpoint(oracles / "checkpoints" / "hf" / "hd") as source:
        assert counterfactual(source, prompt[0], logits.reshape(*prompt.shape, -1)[0], threads=1) is None
