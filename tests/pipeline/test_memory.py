"""Memory that is not there is refused before the work begins."""

from __future__ import annotations

import pytest

from gemma2tool.errors import ResourceError
from gemma2tool.pipeline import memory
from gemma2tool.pipeline.generation import GenerationOptions, generate
from tests.support.checkpoints import random_checkpoint


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

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
