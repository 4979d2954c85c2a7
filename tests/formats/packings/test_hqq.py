"""HQQ: files that transformers and hqq saved (fixtures/frameworks/hqq), values equal to hqq's, refusals."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.errors import InputRefused
from gemma2tool.formats import packings, registry
from gemma2tool.formats.packings.unlabelled import refuse_unlabelled
from tests.support.commands import run
from tests.support.packings import BF16, NAME, bits, lazy

FILES = Path(__file__).parents[3] / "fixtures/frameworks/hqq"
MODULE = NAME.removesuffix(".weight")
CONFIG = {"quant_method": "hqq"}


@pytest.mark.parametrize("name", ["nbits-4", "nbits-3", "native-4", "native-2"])
def test_values_are_hqq_s(name: str) -> None:
    digests = json.loads((FILES / "values.json").read_text())[name]
    with registry.open_checkpoint(FILES / name) as checkpoint:
        quantized = {key for key, tensor in checkpoint.tensors.items() if tensor.stored == "hqq"}
        assert quantized == set(digests) and len(quantized) == 7
        for key, digest in digests.items():
            values = checkpoint.tensors[key].load()
            assert hashlib.sha256(values.tobytes()).hexdigest() == digest, key
            assert bits(checkpoint.tensors[key].load_rows(3, 29)) == bits(values[3:29])


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    result = run("convert", FILES / "native-4", tmp_path / "out", "--to", "hf", "--no-verify")
    assert result.exit_code == 0, result.output
    with registry.open_checkpoint(tmp_path / "out") as written, registry.open_checkpoint(FILES / "native-4") as source:
        assert written.tensors[NAME].stored == "bf16" and written.format == "hf" and source.format == "hf-bin"
        assert bits(written.tensors[NAME].load()) == bits(source.tensors[NAME].load())
        assert "lm_head.weight" not in written.tensors


PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}


def text(value: str) -> np.ndarray:
    return np.frombuffer(value.encode(), np.uint8)


def parts_of(packing: str, axis: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The parts of a weight (16, 32) in groups of 16, and its values, packed code by code."""
    bits_of_code, per_word = PACKINGS[packing]
    generator = np.random.default_rng(bits_of_code)
    shape = (32, 16) if axis == 1 else (16, 32)
    codes = generator.integers(0, 2**bits_of_code, shape)
    step = -(-shape[0] // per_word)
    words = np.zeros((step, shape[1]), np.int64)
    for row, column in np.ndindex(*shape):
        words[row % step, column] |= codes[row, column] << bits_of_code * (per_word - 1 - row // step)
    groups = (32, 1) if axis == 1 else (1, 32)
    scales, zeros = (generator.uniform(0.01, 0.02, groups).astype(BF16) for _ in range(2))
    parts = {
        "W_q": words.astype(np.int32 if packing == "3bit_32" else np.uint8),
        "scale": scales,
        "zero": zeros,
        "shape": np.array([16, 32]),
        "axis": np.array(axis, np.int32),
        "packing": text(packing),
        "nbits": np.array(bits_of_code, np.int32),
    }
    values = ((codes.astype(np.float32) - zeros).astype(BF16) * scales).astype(BF16)
    return {f"{MODULE}.{part}": array for part, array in parts.items()}, values.reshape(16, 32)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("packing", PACKINGS)
def test_every_packing(packing: str, axis: int) -> None:
    raw, values = parts_of(packing, axis)
    tensors = packings.unpack(lazy(raw), CONFIG)
    assert set(tensors) == {NAME} and bits(tensors[NAME].load()) == bits(values)
    assert bits(tensors[NAME].load_rows(7, 12)) == bits(values[7:12])


@pytest.mark.parametrize(
    ("part", "value", "error"),
    [
        ("packing", text("4bit_32"), "hqq.layout"),
        ("packing", text("4bit_u8" * 1000), "hqq.layout"),
        ("axis", np.array(2, np.int32), "hqq.layout"),
        ("axis", np.array([1, 1], np.int32), "hqq.layout"),
        ("quant_scale", np.array(1, np.uint8), "hqq.layout"),
        ("shape", np.array([16, 64]), "packing.part-shape"),
        ("shape", np.array([-16, -32]), "packing.part-shape"),
        ("shape", np.array([1 << 40, 1 << 40]), "packing.part-shape"),
        ("scale", np.ones((16, 1), BF16), "packing.part-shape"),
        ("scale", np.ones((0, 1), BF16), "packing.part-shape"),
        ("zero", np.ones((32, 1), np.float32), "packing.part-type"),
        ("W_q", np.zeros((3, 5), np.uint8), "packing.part-shape"),
        ("zero", None, "packing.missing-part"),
        ("packing", None, "packing.missing-part"),
    ],
)
def test_what_does_not_fit_is_refused(part: str, value: np.ndarray | None, error: str) -> None:
    raw, _ = parts_of("4bit_u8", 1)
    raw.pop(f"{MODULE}.{part}", None)
    if value is not None:
        raw[f"{MODULE}.{part}"] = value
    with pytest.raises(InputRefused) as caught:
        packings.unpack(lazy(raw), CONFIG)
    assert caught.value.id == error


def test_parts_that_do_not_describe_themselves_need_a_config() -> None:
    """hqq's own files have no quantization_config; a file without descriptions is refused by name."""
    raw, _ = parts_of("4bit_u8", 1)
    assert packings.implied_config(raw) == CONFIG
    del raw[f"{MODULE}.packing"]
    assert packings.implied_config(raw) is None
    with pytest.raises(InputRefused, match="is of HQQ"):
        refuse_unlabelled(raw, "x")
