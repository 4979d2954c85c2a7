"""Plain tensors in types that weights are not usually stored in: float8 is widened, what is not a float is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.model.lazy import to_float32
from gemma2tool.reference.streaming import logits
from tests.support.checkpoints import random_checkpoint
from tests.support.formats import refused, write_as

torch = pytest.importorskip("torch")

FILES = {
    "hf": "model.safetensors",
    "hf-bin": "pytorch_model.bin",
    "litgpt": "lit_model.pth",
    "torchtune": "tune_state_dict.pt",
}
FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


def _cast(folder: Path, file: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """The folder with its matrices changed."""
    from safetensors.torch import load_file, save_file

    is_safetensors = file.endswith(".safetensors")
    state = load_file(folder / file) if is_safetensors else torch.load(folder / file, weights_only=True)
    state = {name: change(tensor) if tensor.dim() == 2 else tensor for name, tensor in state.items()}
    if is_safetensors:
        save_file(state, folder / file, metadata={"format": "pt"})
    else:
        torch.save(state, folder / file)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("float8", FLOAT8)
@pytest.mark.parametrize("name", FILES)
def test_plain_float8_is_widened_exactly(tmp_path: Path, name: str, float8: str, dtype: str) -> None:
    """To the type of the other tensors, which holds every float8 value."""
    source = random_checkpoint(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    folder = _cast(write_as(name, source, tmp_path / "out"), FILES[name], lambda t: t.to(FLOAT8[float8]))
    with registry.open_checkpoint(folder) as checkpoint:
        assert any(f"are plain {float8} without scales" in text for text in checkpoint.warnings)
        for tensor_name, tensor in checkpoint.tensors.items():
            expected = source.tensors[tensor_name].load()
            if expected.ndim == 2:
                expected = expected.astype(getattr(ml_dtypes, float8))
            assert tensor.stored_dtype == np.dtype(getattr(ml_dtypes, dtype, dtype)), tensor_name
            assert np.array_equal(to_float32(tensor.load()), expected.astype(np.float32)), tensor_name
        back = registry.open_checkpoint(write_as("hf", checkpoint, tmp_path / "again"))
        assert {tensor.stored for tensor in back.tensors.values()} == {_name(dtype)}


def _name(dtype: str) -> str:
    return {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]


@pytest.mark.peer
@pytest.mark.slow
def test_plain_float8_computes_what_transformers_computes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = random_checkpoint(np.dtype(ml_dtypes.bfloat16))
    folder = _cast(write_as("hf", source, tmp_path / "out"), "model.safetensors", lambda t: t.to(torch.float8_e4m3fn))
    ids = np.random.default_rng(0).integers(3, source.config.vocab_size, (1, 24))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    with registry.open_checkpoint(folder) as checkpoint:
        assert np.abs(logits(checkpoint, ids) - expected).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "int64", "bool", "complex64"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_not_a_float_is_refused(tmp_path: Path, name: str, dtype: str) -> None:
    source = random_checkpoint(np.dtype(np.float32))
    folder = _cast(write_as(name, source, tmp_path / "out"), FILES[name], lambda t: t.to(getattr(torch, dtype)))
    with refused(f"holds {dtype} values, and nothing says how they make weights") as refusal:
        registry.open_checkpoint(folder)
    assert refusal.value.id == "checkpoint.dtype" and "quantization_config" in refusal.value.hint
