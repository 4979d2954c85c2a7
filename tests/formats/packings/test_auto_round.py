"""AutoRound's own exports (fixtures/frameworks/auto_round), and formats that are not read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemma2tool.errors import InputRefused
from gemma2tool.formats import packings, registry
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.quantizers import gptq
from tests.support.kernel_data import rows
from tests.support.packings import NAME, bits, lazy

FILES = Path(__file__).parents[3] / "fixtures/frameworks/auto_round"
Q_PROJ, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
GATE, UP = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"


def opened(name: str) -> Checkpoint:
    return registry.open_checkpoint(FILES / name)


def test_exports_of_one_model_agree() -> None:
    """Symmetric and asymmetric codes in GPTQ's layout, AWQ's layout, and layers with settings of their own."""
    with opened("mixed") as mixed:
        assert {tensor.stored for tensor in mixed.tensors.values()} == {"bf16", "gptq-4", "gptq-8"}
        assert (mixed.tensors[DOWN].stored, mixed.tensors[UP].stored) == ("gptq-8", "bf16")
        assert (mixed.tensors[GATE].group_size, mixed.tensors[Q_PROJ].group_size) == (32, 128)
        for name, stored in (("w4-gptq", "gptq-4"), ("w4-asym", "gptq-4"), ("w4-awq", "awq-4")):
            with opened(name) as other:
                assert {tensor.stored for tensor in other.tensors.values()} == {"bf16", stored}
                is_same = np.array_equal(mixed.tensors[Q_PROJ].load(), other.tensors[Q_PROJ].load())
                assert is_same is (name == "w4-gptq")
                for matrix in (DOWN, UP):  # of 8 bits, and not quantized
                    exact = mixed.tensors[matrix].load_rows_f32(0, 128)
                    error = np.abs(other.tensors[matrix].load_rows_f32(0, 128) - exact).max()
                    assert 0 < error < np.abs(exact).max() / 6


@pytest.mark.parametrize("packing_format", ["auto_round", "auto_round:gptqmodel"])
def test_zero_points_as_they_are(packing_format: str) -> None:
    encoder = gptq.Gptq(4, symmetric=False, checkpoint_format="gptq_v2")
    source = rows("normal", 1, 64, 256)
    parts = encoder.finish((64, 256), encoder.encode(source))
    raw = lazy({packings.part_name(NAME, suffix): array for suffix, array in parts.items()})
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": False}
    tensor = packings.unpack(raw, config | {"packing_format": packing_format})[NAME]
    other = packings.unpack(raw, config | {"quant_method": "gptq", "checkpoint_format": "gptq_v2"})[NAME]
    assert bits(tensor.load()) == bits(other.load())


@pytest.mark.parametrize("packing_format", ["auto_round:fp8", "auto_round:llm_compressor", 7, ["auto_round"]])
def test_other_formats_are_named(packing_format: object) -> None:
    with pytest.raises(InputRefused, match="packing_format is") as caught:
        packings.unpack({}, {"quant_method": "intel/auto-round", "packing_format": packing_format})
    assert caught.value.id == "auto-round.format"


@pytest.mark.parametrize("part", ["scales", "qzeros"])
def test_parts_that_are_missing_or_do_not_fit(part: str) -> None:
    encoder = gptq.Gptq(4)
    parts = encoder.finish((64, 256), encoder.encode(rows("normal", 1, 64, 256)))
    raw = {packings.part_name(NAME, suffix): array for suffix, array in parts.items()}
    name = packings.part_name(NAME, part)
    for array in (None, raw[name][:0], raw[name][:, :0], raw[name][0]):
        changed = raw | {name: array} if array is not None else {key: raw[key] for key in raw if key != name}
        with pytest.raises(InputRefused):
            packings.unpack(lazy(changed), {"quant_method": "auto-round", "bits": 4, "group_size": 128})
