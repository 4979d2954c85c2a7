"""Quantized checkpoints as sources: what libraries wrote is verified, and any type is turned into any format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import packings, registry
from gemma2tool.formats.mapping.container_tensors import open_safetensors
from gemma2tool.model.checkpoint import Checkpoint
from tests.support.checkpoints import write_checkpoint
from tests.support.commands import assert_refused, run
from tests.support.packings import stored_as

pytestmark = pytest.mark.slow

LAYERS = 2

WRITTEN_BY_LIBRARIES = (
    "ao-int8wo-v2", "bnb-fp4", "bnb-fp4dq", "bnb-int8", "bnb-nf4", "bnb-nf4dq", "ctmf-FP8_BLOCK", "ctmf-FP8_DYNAMIC",
    "ctmf-INT8", "ctmf-W4A16", "ctmf-W8A16", "gq-gptq4", "gq-gptq4-desc", "gq-gptq4-v2", "gq-gptq8", "mlx-q4",
    "own-awq",
)  # fmt: skip
MATRIX = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def quantized(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """These layers in every type of a folder, and in doubly quantized nf4: type to path."""
    folder = tmp_path_factory.mktemp("quantized")
    paths = {kind: write_checkpoint(source, folder / kind, type=kind) for kind in packings.TYPES}
    return paths | {"nf4-dq": write_checkpoint(source, folder / "nf4-dq", type="nf4", double_quant=True)}


def test_the_list_of_oracles_is_complete(oracles: Path) -> None:
    assert {path.name for path in (oracles / "quantized").iterdir()} - {"source"} == set(WRITTEN_BY_LIBRARIES)


@pytest.mark.parametrize("folder", WRITTEN_BY_LIBRARIES)
def test_files_of_libraries_are_verified(oracles: Path, folder: str) -> None:
    """Tensors are within their types' bounds; logits are no worse than noise of that size."""
    result = run("verify", oracles / "quantized" / folder, "--reference", oracles / "quantized" / "source", "--json")
    assert result.exit_code == 0, result.output


TARGETS = ("hf", "x.ckpt", "x.gguf", "mlx", "litgpt", "torchtune")
KINDS = (*packings.TYPES, "nf4-dq")
# Every type into one of the formats, and every format from several types.
PAIRS = [(kind, TARGETS[number % len(TARGETS)]) for number, kind in enumerate(KINDS)]


@pytest.mark.parametrize(("kind", "target"), PAIRS)
def test_any_type_into_any_format(quantized: dict[str, Path], tmp_path: Path, kind: str, target: str) -> None:
    """The dequantized values are equal bit for bit."""
    to = [] if "." in target or target == "hf" else ["--to", target]
    result = run("convert", quantized[kind], tmp_path / target, *to, "--dtype", "f32", "--no-verify", "--quiet")
    assert result.exit_code == 0, result.output
    with registry.open_checkpoint(quantized[kind]) as before, registry.open_checkpoint(tmp_path / target) as after:
        assert not after.is_quantized
        for name in (MATRIX, "model.embed_tokens.weight"):
            rows = before.tensors[name].rows
            assert np.array_equal(
                before.tensors[name].load_rows_f32(0, rows), after.tensors[name].load_rows_f32(0, rows)
            )


@pytest.mark.parametrize("kind", ["nf4-dq", "gptq-4", "w4a16-asym", "mlx-8"])
def test_a_conversion_is_verified_against_the_quantized_source(
    quantized: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    result = run("convert", quantized[kind], tmp_path / "out", "--quiet", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["verified"]


@pytest.mark.parametrize(("kind", "other"), list(zip(packings.TYPES, reversed(packings.TYPES), strict=True)))
def test_from_one_quantization_to_another(quantized: dict[str, Path], tmp_path: Path, kind: str, other: str) -> None:
    """Only on request, because both errors add up."""
    assert_refused(run("quantize", quantized[kind], tmp_path / "out", "--type", other), 2, "is already quantized")
    words = ("--type", other, "--allow-requantize", "--dtype", "bf16", "--no-verify", "--quiet")
    result = run("quantize", quantized[kind], tmp_path / "out", *words)
    assert result.exit_code == 0, result.output
    with registry.open_checkpoint(tmp_path / "out") as after:
        assert after.tensors[MATRIX].stored == stored_as(other)


# -- values by the formulas in the formats' documentation --------------------------------------------------------------


def parts_of(folder: Path, name: str) -> dict[str, np.ndarray]:
    prefix = name.removesuffix("weight")
    tensors, _ = open_safetensors([folder / "model.safetensors"], [])
    return {
        stored.removeprefix(prefix): tensor.load() for stored, tensor in tensors.items() if stored.startswith(prefix)
    }


def bit_field(word: int, index: int, bits: int) -> int:
    return (int(word) & 0xFFFFFFFF) >> (index * bits) & ((1 << bits) - 1)


def gptq_value(parts: dict[str, np.ndarray], bits: int, version: int, o: int, i: int) -> float:
    """AutoGPTQ: codes packed along the input, zero points along the output, stored minus one in version 1."""
    per_word, group = 32 // bits, parts["g_idx"][i]
    code = bit_field(parts["qweight"][i // per_word, o], i % per_word, bits)
    zero = bit_field(parts["qzeros"][group, o // per_word], o % per_word, bits) + (1 if version == 1 else 0)
    return (code - zero) * np.float32(parts["scales"][group, o])


def awq_value(parts: dict[str, np.ndarray], group_size: int, o: int, i: int) -> float:
    """AutoAWQ's gemm layout: eight outputs in a word, in a fixed order of nibbles."""
    nibble = (0, 2, 4, 6, 1, 3, 5, 7).index(o % 8)
    code = bit_field(parts["qweight"][i, o // 8], nibble, 4)
    zero = bit_field(parts["qzeros"][i // group_size, o // 8], nibble, 4)
    return (code - zero) * np.float32(parts["scales"][i // group_size, o])


def asymmetric_value(parts: dict[str, np.ndarray], group_size: int, o: int, i: int) -> np.floating:
    """compressed-tensors: codes packed along the input, zero points along the output, both stored plus eight."""
    code = bit_field(parts["weight_packed"][o, i // 8], i % 8, 4) - 8
    zero = bit_field(parts["weight_zero_point"][o // 8, i // group_size], o % 8, 4) - 8
    scale = parts["weight_scale"][o, i // group_size]
    return ((code - zero) * np.float32(scale)).astype(scale.dtype)


PLACES = [(0, 0), (1, 7), (5, 8), (13, 129), (77, 1000), (200, 511), (255, 1023)]


@pytest.mark.parametrize(
    ("kind", "options", "value"),
    [
        ("gptq-4", {}, lambda p, o, i: gptq_value(p, 4, 1, o, i)),
        ("gptq-8", {}, lambda p, o, i: gptq_value(p, 8, 1, o, i)),
        (
            "gptq-4",
            {"gptq_format": "gptq_v2", "symmetric": False, "group_size": 32},
            lambda p, o, i: gptq_value(p, 4, 2, o, i),
        ),
        ("gptq-4", {"symmetric": False, "group_size": -1}, lambda p, o, i: gptq_value(p, 4, 1, o, i)),
        ("awq-4", {}, lambda p, o, i: awq_value(p, 128, o, i)),
        ("awq-4", {"group_size": 32}, lambda p, o, i: awq_value(p, 32, o, i)),
        ("w4a16-asym", {}, lambda p, o, i: asymmetric_value(p, 128, o, i)),
        ("w4a16-asym", {"group_size": 64}, lambda p, o, i: asymmetric_value(p, 64, o, i)),
    ],
)
def test_values_by_the_documented_formula(source: Checkpoint, tmp_path: Path, kind: str, options: dict, value) -> None:
    """The reader gives these values bit for bit, within a step of the source; not every consumer can be installed."""
    path = write_checkpoint(source, tmp_path / "out", type=kind, **options)
    parts = parts_of(path, MATRIX)
    with registry.open_checkpoint(path) as checkpoint:
        values = checkpoint.tensors[MATRIX].load_rows_f32(0, 256)
    original = source.tensors[MATRIX].load_rows_f32(0, 256)
    for o, i in PLACES:
        assert np.float32(value(parts, o, i)) == values[o, i]
    assert np.abs(values - original).max() <= np.abs(original).max() / (7 if "4" in kind else 100)
