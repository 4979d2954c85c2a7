"""llama.cpp loads our files and computes what our forward pass computes over them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.gguf.format import GGUF
from gemma2tool.formats.hf.format import HuggingFace
from gemma2tool.model.checkpoint import Checkpoint
from tests.support.gguf import options, write

pytestmark = pytest.mark.slow


def built_in_logits(checkpoint: Checkpoint, ids: np.ndarray) -> np.ndarray:
    from gemma2tool.reference.streaming import logits

    return logits(checkpoint, ids[None])[0]


def mean_kl(truth: np.ndarray, other: np.ndarray) -> float:
    """KL of the distributions at each position, (T, V) logits each, averaged."""
    p, q = (x.astype(np.float64) - x.max(axis=-1, keepdims=True) for x in (truth, other))
    p, q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


@pytest.mark.parametrize("theta", [10000.0, 160000.0])
def test_f32_logits(llama: ModuleType, oracles: Path, tmp_path: Path, theta: float) -> None:
    """Within 1e-2 of ours (llama.cpp's GELU is a float16 table), past the window of 6; with a rotary base only we
    write, too.
    """
    ids = np.load(oracles / "checkpoints" / "ids.npy")[0]
    with HuggingFace().open(oracles / "checkpoints" / "hf" / "hd") as source:
        source.config = dataclasses.replace(source.config, rope_theta=theta)
        truth = built_in_logits(source, ids)
        (path,) = write(GGUF().layout(source, options(dtype="f32")), tmp_path)
    _, expected = llama.logits(path, ids.tolist())
    assert np.abs(expected - truth).max() < 1e-2
    with GGUF().open(path) as back:
        assert np.abs(built_in_logits(back, ids) - truth).max() < 5e-5


def test_bidirectional_logits(llama: ModuleType, fixture_dir: Path, tmp_path: Path) -> None:
    """llama.cpp attends both ways; beyond the window of 64 its mask is another, as the warning says."""
    ids = np.load(fixture_dir / "heldout.npy").reshape(-1)[:64]
    with registry.open_checkpoint(fixture_dir / "model.ckpt") as source:
        causal = built_in_logits(source, ids)
        source.config = dataclasses.replace(source.config, use_bidirectional_attention=True)
        truth = built_in_logits(source, ids)
        (path,) = write(GGUF().layout(source, options(dtype="f32")), tmp_path)
    _, expected = llama.logits(path, ids.tolist())
    assert np.abs(expected - truth).max() < 1e-2 and np.abs(expected - causal).max() > 1


def test_the_config_read_is_the_model_llama_cpp_runs(llama: ModuleType, oracles: Path) -> None:
    """The oracle's 27B flavour lost its query scale in the GGUF: our reader says so, where the source's own logits are
    0.3 off.
    """
    folder = oracles / "checkpoints"
    ids = np.load(folder / "ids.npy")
    for name in ("hd", "27b"):
        with GGUF().open(folder / "gguf" / f"{name}.gguf") as checkpoint:
            assert checkpoint.config.query_pre_attn_scalar == 16
            mine = built_in_logits(checkpoint, ids[0])
        stored = np.load(folder / "gguf" / f"{name}.llama_cpp_logits.npy")
        _, expected = llama.logits(folder / "gguf" / f"{name}.gguf", ids[0].tolist())
        assert np.abs(mine - expected).max() < 1e-2
        assert np.abs(mine - stored.reshape(-1, *mine.shape)[0]).max() < 1e-2


TYPES = ["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q3_k_m", "q2_k"]


@pytest.mark.parametrize("type", TYPES)
def test_quantized_files_compute_alike(llama: ModuleType, fixture_dir: Path, tmp_path: Path, type: str) -> None:
    """Mean KL below 2e-3 between llama.cpp and our forward pass over the same file's dequantized weights."""
    if not (fixture_dir / "model.ckpt").is_file():
        pytest.skip("the trained fixture is not here")
    ids = np.load(next(fixture_dir.glob("heldout*.npy"))).reshape(-1)[:600].astype(np.int64)
    with registry.open_checkpoint(fixture_dir) as source:
        (path,) = write(GGUF().layout(source, options(type=type)), tmp_path)
        _, expected = llama.logits(path, ids.tolist())
    with GGUF().open(path) as back:
        assert mean_kl(built_in_logits(back, ids), expected) < 2e-3
