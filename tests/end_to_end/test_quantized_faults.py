"""Faults that other tools are known to put into quantized files without noticing: planted here, verified as a user
would.

A fault that contradicts the rest of the file is refused when the file is opened (exit code 3). One that only a
comparison with the source shows fails the verification (exit code 1). Each was seen in a released tool, which its test
names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma2tool.formats import registry
from gemma2tool.formats.mapping.container_tensors import open_safetensors
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import ArrayTensor, to_float32
from tests.support.checkpoints import write_checkpoint
from tests.support.commands import assert_refused, run
from tests.support.packings import BF16, to_torch

pytestmark = pytest.mark.slow

MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def original(fixture_dir: Path) -> Path:
    return fixture_dir / "model.ckpt"


@pytest.fixture
def source(original: Path) -> Iterator[Checkpoint]:
    with registry.open_checkpoint(original) as checkpoint:
        yield checkpoint


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Load the weights, change them, and save them again as torch does."""
    from safetensors.torch import save_file

    closers: list = []
    tensors, metadata = open_safetensors([folder / MODEL], closers)
    arrays = {name: tensor.load() for name, tensor in tensors.items()}
    for close in closers:
        close()
    change(arrays)
    save_file({name: to_torch(array) for name, array in arrays.items()}, folder / MODEL, metadata=metadata)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"] |= changes
    path.write_text(json.dumps(content))


# -- bitsandbytes: saved after a forward pass on a CPU with bfloat16 instructions --------------------------------------


def test_absmax_rearranged_by_a_forward_pass(source: Checkpoint, original: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(source, tmp_path / "out", type="nf4")
    assert run("verify", folder, "--reference", original, "--quiet").exit_code == 0

    def rearrange(arrays: dict[str, np.ndarray]) -> None:
        for name in [name for name in arrays if name.endswith(".absmax")]:
            rows, columns = source.specs[name.removesuffix(".absmax")].shape
            arrays[name] = np.ascontiguousarray(arrays[name].reshape(rows, columns // 64).T).astype(BF16)

    change_tensors(folder, rearrange)
    assert_refused(run("verify", folder, "--reference", original), 3, "absmax", "saved after a forward pass")


def test_a_model_that_the_library_itself_saved_after_a_forward_pass(
    source: Checkpoint, original: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        write_checkpoint(source, tmp_path / "plain"), dtype=torch.bfloat16, device_map="cpu", quantization_config=config
    )
    with torch.no_grad():
        model(torch.arange(2, 34)[None])
    model.save_pretrained(tmp_path / "after")
    tensors, _ = open_safetensors([tmp_path / "after" / MODEL], [])
    if all(tensor.dtype == np.float32 for name, tensor in tensors.items() if name.endswith(".absmax")):
        pytest.skip("without bfloat16 instructions the library does not rearrange absmax")
    assert_refused(run("verify", tmp_path / "after", "--reference", original), 3, "saved after a forward pass")


# -- GPTQ: labels that contradict the content -------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("label", "other"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
@pytest.mark.parametrize("bits", [4, 8])
def test_mislabelled_zero_points(
    source: Checkpoint, original: Path, tmp_path: Path, bits: int, label: str, other: str, symmetric: bool
) -> None:
    """Every weight is off by one step, and libraries load it without an error."""
    folder = write_checkpoint(source, tmp_path / "out", type=f"gptq-{bits}", symmetric=symmetric, gptq_format=label)
    with registry.open_checkpoint(folder) as good:
        assert good.is_quantized
    change_config(folder, checkpoint_format=other)
    assert_refused(
        run("verify", folder, "--reference", original), 3, f"in the convention of {label}, but config.json says {other}"
    )


@pytest.mark.parametrize(
    ("folder", "changes", "words"),
    [
        ("gq-gptq4", {"checkpoint_format": "gptq_v2"}, "in the convention of gptq,"),
        ("gq-gptq4-v2", {"checkpoint_format": "gptq"}, "in the convention of gptq_v2,"),
        ("gq-gptq8", {"checkpoint_format": "gptq_v2"}, "in the convention of gptq,"),
        ("gq-gptq4-desc", {"desc_act": False}, "in act-order"),
    ],
)
def test_relabelled_files_of_gptqmodel(oracles: Path, tmp_path: Path, folder: str, changes: dict, words: str) -> None:
    for name in (MODEL, "config.json"):
        (tmp_path / name).write_bytes((oracles / "quantized" / folder / name).read_bytes())
    reference = oracles / "quantized" / "source"
    with registry.open_checkpoint(tmp_path) as good:
        assert good.is_quantized
    change_config(tmp_path, **changes)
    assert_refused(run("verify", tmp_path, "--reference", reference), 3, words)


def test_zero_points_that_contradict_the_label(source: Checkpoint, original: Path, tmp_path: Path) -> None:
    """vLLM's fast kernel does not read them if the config says sym."""
    folder = write_checkpoint(source, tmp_path / "out", type="gptq-4", symmetric=False)
    change_config(folder, sym=True)
    assert_refused(run("verify", folder, "--reference", original), 3, "sym true")


# -- smoothing folded into a norm that feeds no matrix -----------------------------------------------------------------


def smoothed(source: Checkpoint, norm: str) -> Checkpoint:
    """Columns of gate and up times s, and 1 + w of ``norm`` over s, in every layer."""
    import dataclasses

    generator = np.random.default_rng(3)
    tensors = dict(source.tensors)
    for layer in range(source.config.num_hidden_layers):
        scales = np.exp(generator.normal(0, 0.4, source.config.hidden_size)).astype(np.float32)
        prefix = f"model.layers.{layer}."
        for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
            values = to_float32(tensors[prefix + name].load())
            tensors[prefix + name] = ArrayTensor((values * scales).astype(BF16), origin=name)
        values = to_float32(tensors[prefix + norm].load())
        tensors[prefix + norm] = ArrayTensor(((1 + values) / scales - 1).astype(BF16), origin=norm)
    return dataclasses.replace(source, tensors=tensors, closers=[])


@pytest.mark.parametrize("kind", ["w8a16", "gptq-8", "awq-4"])
def test_smoothing_folded_into_a_post_norm(source: Checkpoint, original: Path, tmp_path: Path, kind: str) -> None:
    """llm-compressor's SmoothQuant mapping and GPTQModel's AWQ do this; the norm feeds the residual stream."""
    folder = write_checkpoint(smoothed(source, "post_attention_layernorm.weight"), tmp_path / "out", type=kind)
    result = run("verify", folder, "--reference", original)
    assert result.exit_code == 1
    assert "post_attention_layernorm" in result.output
    assert "the scales were folded into the wrong norm" in result.output


# -- static schemes saved without calibration --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -892803441754112.0, 1e-21, np.nan])
def test_static_scales_that_were_never_calibrated(
    source: Checkpoint, original: Path, tmp_path: Path, value: float
) -> None:
    """llm-compressor's static FP8 scheme in its data-free pipeline saves uninitialized memory."""
    folder = write_checkpoint(source, tmp_path / "out", type="fp8-dynamic")

    def add(arrays: dict[str, np.ndarray], scale: float) -> None:
        for name in [name for name in arrays if name.endswith(".weight_scale")]:
            arrays[name.replace(".weight_scale", ".input_scale")] = np.array([scale], np.float32)

    change_tensors(folder, lambda arrays: add(arrays, 0.02))
    with registry.open_checkpoint(folder) as good:
        assert good.is_quantized
    change_tensors(folder, lambda arrays: add(arrays, value))
    assert_refused(run("verify", folder, "--reference", original), 3, "input_scale", "never calibrated")


# -- one bit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "codes", "bit"),
    [
        ("gptq-4", ".qweight", 1),
        ("gptq-8", ".qweight", 1),
        ("awq-4", ".qweight", 1),
        ("w4a16", ".weight_packed", 1),
        ("w8a16", ".weight_packed", 2),
    ],
)
def test_one_flipped_bit_of_a_code(
    source: Checkpoint, original: Path, tmp_path: Path, kind: str, codes: str, bit: int
) -> None:
    """If all other codes are the nearest, one that is two steps away is damage (four steps for w8a16)."""
    folder = write_checkpoint(source, tmp_path / "out", type=kind)

    def flip(arrays: dict[str, np.ndarray]) -> None:
        arrays["model.layers.4.mlp.up_proj" + codes].reshape(-1)[1234] ^= 1 << bit

    change_tensors(folder, flip)
    result = run("verify", folder, "--reference", original)
    assert result.exit_code == 1
    assert "model.layers.4.mlp.up_proj.weight" in result.output and "1 of" in result.output
