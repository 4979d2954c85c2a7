"""Parameters that google-deepmind/gemma's ``peft`` has wrapped, by the arithmetic of its ``uniform_quantize``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.orbax.flax import format as flax
from gemma2tool.model.checkpoint import Checkpoint
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import assert_ranges_agree, assert_same_tensors, refused
from tests.support.orbax import Tree, flax_tree, store_arrays

pytest.importorskip("tensorstore", reason="the peer")
pytest.importorskip("zstandard", reason="the flax extra is not installed")

CONFIG = replace(SMALL, num_hidden_layers=2, layer_types=())
_REDUCED = {"q_einsum": (1,), "kv_einsum": (2,), "attn_vec_einsum": (0, 1), "gating_einsum": (2,), "linear": (0,)}
"""The axes over which the channels of a parameter share a scale: the einsum's contracted ones."""


def _wrapped(params: Tree, prefix: str, wrap) -> dict[str, np.ndarray]:
    """The arrays by Orbax's names, with those of ``_REDUCED`` wrapped as ``wrap(name, array)`` says."""
    arrays: dict[str, np.ndarray] = {}
    for module, parts in params.items():
        for part, leaves in parts.items():
            if not module.startswith("layer_") or "norm" in part:
                values = leaves["scale"] if isinstance(leaves, dict) else leaves
                arrays[f"{module}.{part}" + (".scale" if isinstance(leaves, dict) else "")] = values
                continue
            for name, leaf in leaves.items():
                own = "0" if part == "attn" else name
                where = f"{module}.{part}.{name}" if part == "attn" else f"{module}.{part}"
                values = leaf["w"] if isinstance(leaf, dict) else leaf
                arrays |= {f"{where}._{prefix}Einsum_{own}.{key}": array for key, array in wrap(name, values).items()}
    return arrays


def _quantize(bits: int):
    dtype = np.dtype(ml_dtypes.int4 if bits == 4 else np.int8)

    def wrap(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
        largest = np.abs(values).max(axis=_REDUCED[name], keepdims=True)
        scales = np.maximum(np.float32(2 ** (bits - 1) - 1) * (np.float32(1) / largest), np.float32(1e-6))
        codes = np.clip(np.round(values * scales), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(dtype)
        return {"kernel": codes, "scale": scales}

    return wrap


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Checkpoint, Tree]:
    """A model, and its parameters with gating_einsum as ``peft`` can quantize it: (2, F, D)."""
    monkeypatch.setattr(flax, "_shaped_like", lambda *_: False)
    source = random_checkpoint(np.dtype(np.float32), CONFIG)
    return source, flax_tree(source, tmp_path / "written")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized(tmp_path: Path, model: tuple[Checkpoint, Tree], bits: int) -> None:
    source, params = model
    arrays = _wrapped(params, "Int", _quantize(bits))
    store_arrays(tmp_path / "quantized", arrays)
    checkpoint = registry.open_checkpoint(tmp_path / "quantized", config=CONFIG)
    assert_ranges_agree(checkpoint)
    assert checkpoint.is_quantized
    dequantized = dict(arrays)
    for name in [name for name in arrays if name.endswith(".kernel")]:
        scales = dequantized.pop(name.removesuffix("kernel") + "scale")
        dequantized[name] = dequantized.pop(name).astype(np.float32) / scales
    store_arrays(
        tmp_path / "floats", {name.replace("_Int", "_SimulateQuantized"): a for name, a in dequantized.items()}
    )
    assert_same_tensors(registry.open_checkpoint(tmp_path / "floats", config=CONFIG), checkpoint)
    for name, tensor in source.tensors.items():
        values, actual = tensor.load(), checkpoint.tensors[name].load()
        assert np.abs(actual - values).max() <= np.abs(values).max() / 2 ** (bits - 1), name


@pytest.mark.slow
def test_quantization_aware_training(tmp_path: Path, model: tuple[Checkpoint, Tree]) -> None:
    source, params = model
    store_arrays(tmp_path / "qat", _wrapped(params, "SimulateQuantized", lambda name, values: {"kernel": values}))
    assert_same_tensors(source, registry.open_checkpoint(tmp_path / "qat", config=CONFIG))


@pytest.mark.slow
def test_codes_without_their_scales_are_refused(tmp_path: Path, model: tuple[Checkpoint, Tree]) -> None:
    _, params = model
    arrays = _wrapped(params, "Int", _quantize(8))
    lost = "layer_1.mlp._IntEinsum_linear.scale"
    store_arrays(tmp_path / "lost", {name: array for name, array in arrays.items() if name != lost})
    with refused("layer_1.mlp._IntEinsum_linear.kernel holds int8 values without the scales") as caught:
        registry.open_checkpoint(tmp_path / "lost", config=CONFIG)
    assert caught.value.id == "orbax.dtype"
    store_arrays(tmp_path / "other", arrays | {lost: arrays[lost][:, :-1]})
    with refused("scales of shape .* do not fit codes"):
        registry.open_checkpoint(tmp_path / "other", config=CONFIG)
