"""Spellings of config.json that users' folders have, with what transformers computes for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from tests.support.checkpoints import random_checkpoint
from tests.support.formats import write_as
from tests.support.options import write_options

F32 = np.dtype(np.float32)


@pytest.mark.parametrize("name", ["hf", "hf-bin"])
def test_a_flag_that_transformers_ignores_is_named(tmp_path: Path, name: str) -> None:
    """transformers documents use_bidirectional_attention; its default attention goes by is_causal (43705, 46077)."""
    source = random_checkpoint(F32)
    source.config = dataclasses.replace(source.config, use_bidirectional_attention=True)
    output = registry.by_name(name).layout(source, write_options(name="out"))
    assert any("is_causal" in line for line in output.warnings)
    back = registry.open_checkpoint(write_as(name, source, tmp_path / "out"))
    assert back.config.use_bidirectional_attention and "is_causal" not in back.config.extra
    both = dataclasses.replace(source.config, extra={"is_causal": False})
    assert not list(back.facts.assumptions(both))
