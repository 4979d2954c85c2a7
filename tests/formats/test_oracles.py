"""Every checkpoint that peers wrote, found by walking their folder: read, and run to the logits of Google's
gemma_pytorch.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.errors import ToolError
from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint
from tests.support.formats import assert_same_tensors, oracle_config, truth_of, write_as
from tests.support.oracles import ORACLES


def _checkpoints(root: Path) -> list[str]:
    """``format/variant`` of each checkpoint: the folders and weight files below the formats' folders."""
    if not root.is_dir():
        return []
    paths = [path for folder in root.iterdir() if folder.is_dir() for path in folder.iterdir()]
    return sorted(str(path.relative_to(root)) for path in paths if path.is_dir() or path.suffix == ".gguf")


ALL = _checkpoints(ORACLES / "checkpoints")


def _lacks_config(path: Path) -> bool:
    return registry.detect(path).lacks_config(path)


def _flavour(name: str) -> str:
    match = re.search(r"(?:^|[/-])(hd|27b)(?=[._]|$)", name)
    if match is None:
        assert name == "keras/sharded", f"whose logits should {name} have?"
        return "hd"
    return match[1]


def _open(oracles: Path, name: str) -> Checkpoint:
    flavour = _flavour(name)
    path, config = oracles / "checkpoints" / name, oracle_config(oracles, flavour)
    if name != "gguf/27b.gguf":  # which cannot represent the query scale of a 27b with fewer layers
        config = registry.config_for(path, config)
    return registry.open_checkpoint(path, config=config)


def _assert_within_bound(actual: np.ndarray, truth: np.ndarray) -> None:
    assert (np.abs(actual - truth) <= 5e-5 + 1e-5 * np.abs(truth)).all(), np.abs(actual - truth).max()


def test_the_oracles_are_complete(oracles: Path) -> None:
    formats = {name.split("/")[0] for name in ALL}
    assert {"gemma_pytorch", "flax", "keras", "hf", "mlx", "litgpt", "torchtune", "gguf"} <= formats and len(ALL) >= 28


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if not name.endswith("_q4")])
def test_logits_of_gemma_pytorch(oracles: Path, name: str) -> None:
    """In float32 over the stored weights. The int8 checkpoints have logits of their own; bfloat16 ones hold the values
    of their twins, whose logits gemma_pytorch computed in float32.
    """
    from gemma2tool.reference.streaming import logits

    truth = _flavour(name) + ("_int8" if name.endswith("_int8") else "")
    with _open(oracles, name) as checkpoint:
        actual = logits(checkpoint, np.load(oracles / "checkpoints" / "ids.npy"))
    _assert_within_bound(actual, np.load(oracles / "checkpoints" / "gemma_pytorch" / truth / "logits.npy"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name.endswith("_q4")])
def test_quantized_checkpoints_through_their_dequantized_weights(oracles: Path, tmp_path: Path, name: str) -> None:
    """The oracles have no logits of mlx: transformers computes them from the weights that mlx itself dequantizes."""
    import torch
    from transformers import Gemma2ForCausalLM

    from gemma2tool.reference.streaming import logits

    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    ids = np.load(oracles / "checkpoints" / "ids.npy")
    checkpoint = _open(oracles, name)
    stored = mx.load(str(oracles / "checkpoints" / name / "model.safetensors"))
    model = Gemma2ForCausalLM.from_pretrained(
        oracles / "checkpoints" / "hf" / _flavour(name), attn_implementation="eager"
    ).float()
    state, quantized = model.state_dict(), 0
    for key in checkpoint.tensors:
        module = key.removesuffix(".weight")
        value = stored[key]
        if module + ".scales" in stored:
            value = mx.dequantize(value, stored[module + ".scales"], stored[module + ".biases"], group_size=32, bits=4)
            quantized += 1
        state[key].copy_(torch.from_numpy(np.array(value.astype(mx.float32))))
    assert quantized
    with torch.no_grad():
        truth = model(torch.from_numpy(ids)).logits.numpy()
    _assert_within_bound(logits(checkpoint, ids), truth)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if "_q4" not in name and "_int8" not in name])
def test_the_same_tensors_as_hugging_face(oracles: Path, name: str) -> None:
    """Bit for bit those that the transformers conversion script made of the same weights, whatever type they are stored
    in.
    """
    assert_same_tensors(truth_of(oracles, _flavour(name)), _open(oracles, name), dtypes=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_each_is_converted_to_hugging_face(oracles: Path, tmp_path: Path, name: str) -> None:
    checkpoint = _open(oracles, name)
    assert_same_tensors(
        checkpoint, registry.open_checkpoint(write_as("hf", checkpoint, tmp_path / "out")), dtypes=False
    )


@pytest.mark.parametrize("name", [name for name in ALL if _lacks_config(ORACLES / "checkpoints" / name)])
def test_a_config_that_is_stored_nowhere_is_required(oracles: Path, name: str) -> None:
    with pytest.raises(ToolError) as caught:
        registry.open_checkpoint(oracles / "checkpoints" / name)
    assert "--config" in caught.value.hint
