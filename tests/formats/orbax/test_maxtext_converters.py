"""MaxText's two converters, which scale embeddings and queries by different factors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.orbax.maxtext.format import CONVERTER
from gemma2tool.model.checkpoint import Checkpoint
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import assert_same_tensors, refused, write_as
from tests.support.orbax import store_arrays, stored_arrays

pytest.importorskip("tensorstore", reason="the flax extra is not installed")
pytest.importorskip("zstandard", reason="the flax extra is not installed")

CONFIG = replace(SMALL, num_hidden_layers=2, layer_types=(), hidden_size=72, query_pre_attn_scalar=18)
"""As in 27B: query_pre_attn_scalar is D / H, and neither its root nor that of D is a power of two."""


def _by_to_maxtext(source: Checkpoint, folder: Path) -> Path:
    """The checkpoint of ``to_maxtext.py``: its hooks (``param_mapping.py``) multiply by unrounded float32 factors."""
    arrays = stored_arrays(write_as("maxtext", source, folder / "ours") / "0" / "items")
    config, dtype = source.config, source.dtype

    def times(name: str, factor: float) -> np.ndarray:
        return (source.tensors[name].load() * np.float32(factor)).astype(dtype)

    embedding = arrays["params.params.token_embedder.embedding"]
    embedding[: config.vocab_size] = times("model.embed_tokens.weight", config.hidden_size**0.5)
    for layer, kind in enumerate(("local", "global")):
        query = arrays[f"params.params.decoder.layers.self_attention_{kind}.query.kernel"]
        values = times(f"model.layers.{layer}.self_attn.q_proj.weight", 1 / np.sqrt(config.head_dim))
        query[:, 0] = values.T.reshape(config.hidden_size, config.num_attention_heads, config.head_dim)
    store_arrays(folder / "theirs" / "0" / "items", arrays)
    return folder / "theirs"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_to_maxtext_wrote_is_read_by_its_factors_if_the_config_names_it(tmp_path: Path, dtype: str) -> None:
    source = random_checkpoint(np.dtype(getattr(ml_dtypes, dtype, dtype)), CONFIG)
    folder = _by_to_maxtext(source, tmp_path)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf() | {CONVERTER: "to_maxtext"}))
    checkpoint = registry.open_checkpoint(folder)
    assert checkpoint.config == CONFIG and not any("converters" in warning for warning in checkpoint.warnings)
    expected = registry.by_name("maxtext").expected_after_roundtrip(source, checkpoint)
    assert_same_tensors(replace(source, tensors=source.tensors | expected), checkpoint)


@pytest.mark.slow
def test_a_checkpoint_that_does_not_say_is_read_as_the_other_converters_with_a_warning(tmp_path: Path) -> None:
    source = random_checkpoint(np.dtype(np.float32), CONFIG)
    checkpoint = registry.open_checkpoint(_by_to_maxtext(source, tmp_path), config=CONFIG)
    [warning] = [warning for warning in checkpoint.warnings if "converters" in warning]
    assert "convert_gemma2_chkpt.py: embedding 8.48528, queries 0.235702" in warning
    assert "to_maxtext.py: embedding 8.48528, queries 0.176777" in warning and '"to_maxtext"' in warning
    query = "model.layers.1.self_attn.q_proj.weight"
    ratio = checkpoint.tensors[query].load() / source.tensors[query].load()
    assert np.allclose(ratio, (18 / 32) ** 0.5, rtol=1e-5)


@pytest.mark.slow
def test_what_gemma2tool_writes_says_it(tmp_path: Path) -> None:
    source = random_checkpoint(np.dtype(np.float32), CONFIG)
    folder = write_as("maxtext", source, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())[CONVERTER] == "convert_gemma2_chkpt"
    assert not any("converters" in warning for warning in registry.open_checkpoint(folder).warnings)


@pytest.mark.parametrize(
    ("dtype", "width", "head_dim"), [("float32", 72, 32), ("bfloat16", 64, 16)], ids=["as in 9B", "as in 2B"]
)
def test_where_the_converters_agree_nothing_is_said(tmp_path: Path, dtype: str, width: int, head_dim: int) -> None:
    config = replace(CONFIG, hidden_size=width, head_dim=head_dim, query_pre_attn_scalar=head_dim)
    source = random_checkpoint(np.dtype(getattr(ml_dtypes, dtype, dtype)), config)
    folder = write_as("maxtext", source, tmp_path / "out")
    assert CONVERTER not in json.loads((folder / "config.json").read_text())
    assert not any("converters" in warning for warning in registry.open_checkpoint(folder).warnings)


def test_another_name_is_refused(tmp_path: Path) -> None:
    folder = write_as("maxtext", random_checkpoint(np.dtype(np.float32), CONFIG), tmp_path / "out")
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf() | {CONVERTER: "mine"}))
    with refused("maxtext_converter is 'mine', not one of convert_gemma2_chkpt, to_maxtext") as caught:
        registry.open_checkpoint(folder)
    assert caught.value.id == "maxtext.converter"
