"""Through any two formats and back: every tensor bit for bit, for configs of every shape that the formats must tell apart."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from format_support import assert_ranges_agree, assert_same_tensors, write_as
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests_support import random_checkpoint

from gemma2tool.formats import registry
from gemma2tool.model.config import Gemma2Config

NEEDS = {"flax": "tensorstore", "keras": "h5py"}
INEXACT = {"gguf", "maxtext", "gemma-cpp"}
"""Formats whose conventions (w + 1, scaled queries) or types can lose bits of float32; each has tests of its own."""
LOSSLESS = [name for name in registry.NAMES if name not in INEXACT and (name not in NEEDS or find_spec(NEEDS[name]))]
NAME = {"gemma-pytorch": "model.ckpt"}


@st.composite
def configs(draw) -> Gemma2Config:
    """Small models: 1 to 8 kv heads, head_dim times heads equal to D or not, F more or less than D."""
    kv = draw(st.sampled_from((1, 2, 4, 8)))
    head_dim = draw(st.sampled_from((2, 4, 6)))
    heads = kv * draw(st.sampled_from((1, 2, 3)))
    hidden = draw(st.sampled_from((heads * head_dim, 24, 40)))
    return Gemma2Config(
        vocab_size=draw(st.sampled_from((5, 128, 130))),
        hidden_size=hidden,
        intermediate_size=draw(st.sampled_from((20, 52, 60))),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head_dim,
        query_pre_attn_scalar=draw(st.sampled_from((head_dim, hidden / heads))),
        max_position_embeddings=32,
        sliding_window=8,
    )


@pytest.mark.parametrize(("first", "second"), list(itertools.product(LOSSLESS, LOSSLESS)))
@settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(config=configs(), dtype=st.sampled_from((np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))))
def test_there_and_back(first: str, second: str, config: Gemma2Config, dtype: np.dtype) -> None:
    source = random_checkpoint(dtype, config)
    place = Path(tempfile.mkdtemp())
    try:
        checkpoint = source
        for number, name in enumerate((first, second)):
            folder = place / str(number)
            folder.mkdir()
            path = write_as(name, checkpoint, folder / NAME.get(name, "model"), memory=1 << 16)
            assert registry.detect(path).name == name
            checkpoint = registry.open_checkpoint(path)
        assert_same_tensors(source, checkpoint)
        assert_ranges_agree(checkpoint)
        for field in ("hidden_size", "intermediate_size", "num_key_value_heads", "head_dim", "query_pre_attn_scalar", "sliding_window"):
            assert getattr(checkpoint.config, field) == getattr(config, field), field
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize("name", ["litgpt", "hf"])
def test_an_untied_head_travels_where_there_is_a_place(tmp_path: Path, name: str) -> None:
    from dataclasses import replace

    from tests_support import SMALL

    source = random_checkpoint(np.dtype(np.float32), replace(SMALL, tie_word_embeddings=False))
    assert "lm_head.weight" in source.tensors
    assert_same_tensors(source, registry.open_checkpoint(write_as(name, source, tmp_path / "out")))
