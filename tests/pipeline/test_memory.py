"""Memory that is not there is refused before the work begins."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.errors import ResourceError
from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline import memory
from gemma2tool.pipeline.generation import GenerationOptions, generate
from gemma2tool.pipeline.importance import ImatrixOptions, collect_imatrix, plan_imatrix
from gemma2tool.pipeline.logits import compute_logits
from gemma2tool.pipeline.needs import work
from tests.support.checkpoints import first_layers
from tests.support.paths import TINY


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Checkpoint]:
    """The fixture's first layer, with its tokenizer."""
    with registry.open_checkpoint(TINY / "model.ckpt") as source:
        yield first_layers(source, 1)


def test_weights_that_do_not_fit(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = work.LEAST_TORCH_BYTES + 4 * checkpoint.parameters
    monkeypatch.setattr(memory, "reported_memory", lambda: needed - 1)
    monkeypatch.setattr("gemma2tool.pipeline.generation._generate", lambda *arguments: "ran")
    with pytest.raises(ResourceError) as caught:
        generate(checkpoint, "text", GenerationOptions())
    assert caught.value.id == "memory.exhausted" and "--stream-weights" in caught.value.hint
    assert generate(checkpoint, "text", GenerationOptions(dtype="bf16")) == "ran"
    monkeypatch.setattr(memory, "reported_memory", lambda: needed)
    assert generate(checkpoint, "text", GenerationOptions()) == "ran"


def test_generation_that_streams_needs_less_than_the_weights(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma2tool.pipeline.generation._generate", lambda *arguments: "ran")
    monkeypatch.setattr("gemma2tool.pipeline.generation._weight_bytes", lambda *arguments: 1 << 40)
    monkeypatch.setattr(memory, "reported_memory", lambda: 1 << 40)
    with pytest.raises(ResourceError):
        generate(checkpoint, "text", GenerationOptions())
    assert generate(checkpoint, "text", GenerationOptions(stream_weights=True)) == "ran"


def test_a_system_that_does_not_say_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "reported_memory", lambda: None)
    memory.check_memory(1 << 60, "weights", "hint")
    assert memory.reported_memory() is None


@pytest.mark.parametrize("command", ["logits", "imatrix"])
def test_activations_that_do_not_fit(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Refused before anything is read or written."""
    ids, text, out = np.full((2, 40), 3), tmp_path / "text.txt", tmp_path / "out"
    text.write_text("a word and a word " * 40)
    options = ImatrixOptions(chunk_size=16, max_chunks=2)
    if command == "logits":
        needed = work.least_of_forward(checkpoint.config, (2, 40), "", at_once=True).memory
    else:
        needs = plan_imatrix(checkpoint, text, out, options)
        assert needs is not None and needs.least is not None
        needed = needs.least.memory

    def carry_out() -> object:
        if command == "logits":
            return compute_logits(checkpoint, ids, out.with_suffix(".npy"), force=False, threads=1, device="cpu")
        return collect_imatrix(checkpoint, text, out, options)

    monkeypatch.setattr(memory, "reported_memory", lambda: needed - 1)
    with pytest.raises(ResourceError) as caught:
        carry_out()
    assert caught.value.id == "memory.exhausted" and caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == [text]
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
