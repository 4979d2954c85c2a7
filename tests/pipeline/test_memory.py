"""Memory that is not there is refused before the work begins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.errors import ResourceError
from gemma2tool.pipeline import importance, layer_by_layer, logits, memory
from gemma2tool.pipeline.generation import GenerationOptions, generate
from tests.support.checkpoints import SMALL, random_checkpoint


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = random_checkpoint(np.dtype(np.float32))
    needed = 4 * sum(tensor.size for tensor in checkpoint.tensors.values())
    monkeypatch.setattr(memory, "reported_memory", lambda: needed - 1)
    monkeypatch.setattr("gemma2tool.pipeline.generation._generate", lambda *arguments: "ran")
    with pytest.raises(ResourceError) as caught:
        generate(checkpoint, "text", GenerationOptions())
    assert caught.value.id == "memory.exhausted" and "--stream-weights" in caught.value.hint
    for options in (GenerationOptions(dtype="bf16"), GenerationOptions(stream_weights=True)):
        assert generate(checkpoint, "text", options) == "ran"
    monkeypatch.setattr(memory, "reported_memory", lambda: needed)
    assert generate(checkpoint, "text", GenerationOptions()) == "ran"


def test_a_system_that_does_not_say_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "reported_memory", lambda: None)
    memory.check_memory(1 << 60, "weights", "hint")
    assert memory.reported_memory() is None


@pytest.mark.parametrize("work", ["logits", "imatrix"])
def test_activations_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    """Refused before anything is read or written."""
    checkpoint = random_checkpoint(np.dtype(np.float32))
    ids = np.full((2, 40), 3)
    needed = 2 * 40 * 2 * (SMALL.hidden_size + SMALL.intermediate_size) * 4
    if work == "imatrix":
        needed += layer_by_layer.layer_bytes(checkpoint)

    def carry_out() -> object:
        if work == "logits":
            return logits.write_logits(checkpoint, ids, tmp_path / "out.npy", force=False, threads=1)
        return importance.collect(checkpoint, ids, threads=1, folder=tmp_path)

    monkeypatch.setattr(memory, "reported_memory", lambda: needed - 1)
    with pytest.raises(ResourceError) as caught:
        carry_out()
    assert caught.value.id == "memory.exhausted" and caught.value.exit_code == 4
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(memory, "reported_memory", lambda: needed)
    carry_out()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_the_limits_of_the_process_count(limit: str) -> None:
    code = (
        "import resource; from gemma2tool.pipeline.memory import reported_memory;"
        f"resource.setrlimit(resource.{limit}, (3 << 30, 3 << 30)); print(reported_memory())"
    )
    there = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 1 << 30 < there < 3 << 30


def test_the_limit_of_the_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\nactive_file 50000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory.reported_memory() == 250_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.reported_memory() != 250_000
