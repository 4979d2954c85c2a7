"""Through any two formats, for configs of every shape that the formats must distinguish: every tensor bit for bit,
except those that a format's own convention rounds. These are named before anything is written, and come back exactly
as the convention says.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gemma2tool.formats import registry
from gemma2tool.formats.base import Output
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.pipeline.conversion import save
from gemma2tool.verify.run import VerifySettings, verify
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import assert_ranges_agree, assert_same_tensors, refused, suffix_of, write_as

pytestmark = pytest.mark.slow

ROUNDING = {"gguf", "maxtext"}
"""Formats that store w + 1 of a norm, or other sums and products, and can lose low bits. The others are lossless."""
OWN_HEAD = {"hf", "hf-bin", "mlx", "litgpt"}
"""Formats that can hold a head that is not the embedding."""
RAM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Hundreds of small files are synced here, which is slow on a disk."""
F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


@st.composite
def configs(draw, pair: set[str]) -> Gemma2Config:
    """Small models: 1 to 8 kv heads, head_dim times heads equal to D or not, F more or less than D or equal to it, a
    head of its own where both formats have one. What one of the formats cannot represent is left out; its refusal has
    its own tests.
    """
    kv = draw(st.sampled_from((1, 2, 4, 8)))
    head_dim = draw(st.sampled_from((2, 4, 6)))
    heads = kv * draw(st.sampled_from((1, 2, 3)))
    hidden = draw(st.sampled_from((heads * head_dim, 24, 40)))
    layers = draw(st.sampled_from((2, 4) if "maxtext" in pair else (1, 2, 3)))
    return Gemma2Config(
        vocab_size=draw(st.sampled_from((5, 128, 130))),
        hidden_size=hidden,
        intermediate_size=draw(st.sampled_from((20, 40, 52))),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim if "gguf" in pair else draw(st.sampled_from((head_dim, hidden / heads))),
        max_position_embeddings=32,
        sliding_window=8,
        tie_word_embeddings=not (pair <= OWN_HEAD and draw(st.booleans())),
    )


@pytest.mark.parametrize(("first", "second"), list(itertools.product(registry.NAMES, registry.NAMES)))
@settings(
    max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_there_and_back(first: str, second: str, data: st.DataObject) -> None:
    pair = {first, second}
    config = data.draw(configs(pair))
    dtype = data.draw(st.sampled_from((F32, BF16) if "gemma-cpp" in pair else (F32, BF16, F16)))
    like_2b = config.hidden_size != config.intermediate_size and data.draw(st.booleans())
    source = random_checkpoint(dtype, config)
    expected: Mapping = source.tensors
    place = Path(tempfile.mkdtemp(dir=RAM))
    try:
        checkpoint = source
        for number, name in enumerate((first, second)):
            folder = place / str(number)
            folder.mkdir()
            written = folder / f"model{suffix_of(name)}"
            with mock.patch(
                "gemma2tool.formats.orbax.flax.format._shaped_like", return_value=like_2b
            ):  # the order of gating_einsum
                output = registry.by_name(name).layout(checkpoint, WriteOptions(name=written.name))
                write_as(name, checkpoint, written, memory=1 << 16)
            assert registry.detect(written).name == name
            back = registry.open_checkpoint(written)
            rounded = registry.by_name(name).expected_after_roundtrip(checkpoint, back)
            assert name in ROUNDING or not rounded
            _assert_named(name, output, checkpoint, rounded)
            expected = {**expected, **rounded}
            checkpoint = back
        assert_same_tensors(replace(source, tensors=dict(expected)), checkpoint, dtypes=not pair & ROUNDING)
        assert_ranges_agree(checkpoint)
        for field in (
            "hidden_size",
            "intermediate_size",
            "num_key_value_heads",
            "head_dim",
            "query_pre_attn_scalar",
            "sliding_window",
            "tie_word_embeddings",
        ):
            assert getattr(checkpoint.config, field) == getattr(config, field), field
    finally:
        shutil.rmtree(place)


def _assert_named(format_name: str, output: Output, source: Checkpoint, rounded: Mapping) -> None:
    """Each tensor that changes was named when the output was laid out, and no GGUF tensor that does not."""
    changed = {
        name
        for name, tensor in rounded.items()
        if not np.array_equal(tensor.load().astype(np.float32), source.tensors[name].load().astype(np.float32))
    }
    if format_name == "gguf":
        assert {name for name, _ in output.losses} == changed
    words = {"norm": "all norms", "q_proj": "all q_proj", "embed_tokens": "the embedding"}
    for name in changed if format_name == "maxtext" else ():
        phrase = next(phrase for part, phrase in words.items() if part in name)
        assert any(phrase in line for line in output.warnings), name


@pytest.mark.parametrize("name", registry.NAMES)
def test_norms_of_bfloat16_lose_nothing_in_float32(tmp_path: Path, name: str) -> None:
    """As in released models: no format, not even GGUF or MaxText, changes a bit of them."""
    config = replace(
        SMALL, num_hidden_layers=2, layer_types=(), head_dim=16, query_pre_attn_scalar=16
    )  # scales are powers of two
    source = random_checkpoint(BF16, config)
    for tensor_name, tensor in source.tensors.items():
        if "norm" in tensor_name:  # of 2 ** -16 at least, or zero
            tensor.array[np.abs(tensor.array.astype(np.float32)) < 2**-16] = 0
    output = registry.by_name(name).layout(source, WriteOptions(name=f"x{suffix_of(name)}", dtype="f32"))
    assert not output.losses
    back = registry.open_checkpoint(write_as(name, source, tmp_path / f"out{suffix_of(name)}", dtype="f32"))
    assert_same_tensors(source, back, dtypes=False)


@pytest.mark.parametrize("name", registry.NAMES)
def test_an_untied_head_is_kept_or_refused_by_name(tmp_path: Path, name: str) -> None:
    config = replace(SMALL, num_hidden_layers=2, layer_types=(), tie_word_embeddings=False)
    source = random_checkpoint(F32, config)
    assert "lm_head.weight" in source.tensors
    path = tmp_path / f"out{suffix_of(name)}"
    if name in OWN_HEAD:
        assert_same_tensors(source, registry.open_checkpoint(write_as(name, source, path)))
        return
    with refused("lm_head.weight"):
        write_as(name, source, path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", registry.NAMES)
def test_an_untied_copy_of_the_embedding_becomes_one_matrix_where_the_format_has_one(tmp_path: Path, name: str) -> None:
    """mergekit PR 406: two equal matrices compute what one does; a format with one place writes the tied model."""
    config = replace(SMALL, num_hidden_layers=2, layer_types=())
    tied = random_checkpoint(F32, config)
    head = {"lm_head.weight": tied.tensors["model.embed_tokens.weight"]}
    source = replace(tied, config=replace(config, tie_word_embeddings=False), tensors=tied.tensors | head)
    path, like = tmp_path / f"out{suffix_of(name)}", tmp_path / f"like{suffix_of(name)}"
    save(source, path, to=name)
    save(tied if registry.FACTS[name].ties_head else source, like, to=name)
    with registry.open_checkpoint(path) as candidate, registry.open_checkpoint(like) as expected:
        assert_same_tensors(expected, candidate)
        assert verify(source, candidate, VerifySettings(levels=("completeness", "config"))).passed
