"""NVFP4 without a scale of the whole tensor, through llama.cpp as people have it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemma2tool.engines.run import ENGINES, EngineQuestion, ask
from gemma2tool.formats import registry
from gemma2tool.reference.streaming import logits
from tests.support.commands import run
from tests.support.logits import mean_kl
from tests.support.paths import TINY

TOKENS = 100


@pytest.mark.slow
@pytest.mark.peer
def test_llama_cpp_loses_no_more_than_the_type(tmp_path: Path) -> None:
    """Its KL from the source is within 10 % of that of the same values in float32: its kernels read the codes and the
    scales of the blocks as they are meant, and its 8-bit activations cost little beside the type."""
    pytest.importorskip("xllamacpp")
    ids = np.load(TINY / "heldout.npy")[0, :TOKENS].astype(np.int64)
    quantized, floats = tmp_path / "nvfp4.gguf", tmp_path / "f32.gguf"
    for words in (
        ("quantize", TINY / "model.ckpt", quantized, "--type", "nvfp4"),
        ("convert", quantized, floats, "--dtype", "f32"),
    ):
        result = run(*words, "--no-verify", "-q")
        assert result.exit_code == 0, result.output
    with registry.open_checkpoint(TINY / "model.ckpt") as source:
        expected = logits(source, ids[None])[0]

    def kl(path: Path) -> float:
        with registry.open_checkpoint(path) as checkpoint:
            answer = ask(ENGINES["llama.cpp"], checkpoint, EngineQuestion(ids.tolist(), TOKENS, (), ()))
        assert answer.logits is not None, answer.refused
        return mean_kl(expected, answer.logits)

    of_values = kl(floats)
    assert of_values > 1e-3  # the type, not nothing
    assert kl(quantized) == pytest.approx(of_values, rel=0.1)
