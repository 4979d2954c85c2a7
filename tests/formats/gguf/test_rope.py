"""Rotary scaling and patterns of sliding layers as GGUF keys, and back (vllm 10537; unsloth PR 736)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma2tool.errors import InputRefused
from gemma2tool.formats import registry
from gemma2tool.formats.gguf.config import cap_keys, shape_keys, unusual_keys
from gemma2tool.formats.gguf.format import GGUF
from gemma2tool.formats.gguf.key_values import KeyReader, booleans, f32, string, u32
from gemma2tool.formats.gguf.rope import read_layer_types, read_scaling
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.config_fields import FULL, SLIDING, comparable_value
from tests.formats.gguf.test_llama_cpp import built_in_logits
from tests.support.checkpoints import SMALL
from tests.support.gguf import options, write

YARN = {"rope_type": "yarn", "factor": 4.0}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "linear 8/3": {"rope_type": "linear", "factor": 2.6666666667},
    "yarn": YARN,
    "yarn of 1024": {**YARN, "original_max_position_embeddings": 1024},
    "yarn, its defaults spelled out": {**YARN, "beta_fast": 32, "beta_slow": 1.0, "truncate": True},
    "yarn, attention_factor": {**YARN, "attention_factor": 1.5},
    "yarn, mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
}
PATTERNS = {"3": "ssfssf", "4": "sssfss", "none full": "ssssss", "irregular": "ssffsf", "two at the end": "sssfff"}


def keys_of(config: Gemma2Config) -> KeyReader:
    return KeyReader(dict([*shape_keys(config), *cap_keys(config)]), "model.gguf")


def pattern(letters: str) -> tuple[str, ...]:
    return tuple(SLIDING if letter == "s" else FULL for letter in letters)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_a_scaling_comes_back(scaling: Mapping[str, Any]) -> None:
    config = dataclasses.replace(SMALL, rope_scaling=scaling)
    back = read_scaling(keys_of(config))
    assert comparable_value("rope_scaling", back) == comparable_value("rope_scaling", scaling)
    (warning,) = unusual_keys(config)
    assert "rope_scaling is" in warning and "gemma2.rope.scaling.type" in warning


@pytest.mark.parametrize("letters", PATTERNS.values(), ids=PATTERNS)
def test_a_pattern_comes_back(letters: str) -> None:
    config = dataclasses.replace(SMALL, num_hidden_layers=6, layer_types=pattern(letters))
    assert read_layer_types(keys_of(config), 6) == config.layer_types
    assert "layer_types" in unusual_keys(config)[0]


def test_gemma_2_has_none_of_the_keys() -> None:
    names = keys_of(SMALL).kv
    assert not [name for name in names if "rope" in name or "pattern" in name] and not unusual_keys(SMALL)


@pytest.mark.parametrize("name", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_alone_is_linear(name: str) -> None:
    assert read_scaling(KeyReader({f"gemma2.{name}": f32(2.0)}, "x")) == SCALINGS["linear"]


@pytest.mark.parametrize("kind", ["none", "longrope"])
def test_other_scalings_are_refused(kind: str) -> None:
    keys = {"gemma2.rope.scaling.type": string(kind), "gemma2.rope.scaling.factor": f32(2.0)}
    with pytest.raises(InputRefused) as refused:
        read_scaling(KeyReader(keys, "x"))
    assert refused.value.id == "gguf.rope-scaling"


def test_a_pattern_of_another_length_is_refused() -> None:
    with pytest.raises(InputRefused, match="3 values for 6 layers"):
        read_layer_types(KeyReader({"gemma2.attention.sliding_window_pattern": booleans([True, False, True])}, "x"), 6)


def test_a_number_that_does_not_fit_is_named() -> None:
    config = dataclasses.replace(SMALL, rope_scaling={**YARN, "original_max_position_embeddings": 1 << 40})
    with pytest.raises(InputRefused) as refused:
        shape_keys(config)
    assert refused.value.id == "gguf.range"
    assert u32(3) != booleans([True])


CHANGES: Mapping[str, Mapping[str, Any]] = {
    "linear": {"rope_scaling": SCALINGS["linear"]},
    "yarn": {"rope_scaling": SCALINGS["yarn of 1024"], "max_position_embeddings": 4096},
    "attention_factor": {"rope_scaling": SCALINGS["yarn, attention_factor"]},
    "3": {"layer_types": pattern("ssfssf")},
    "none full": {"layer_types": pattern("ssssss")},
    "irregular": {"layer_types": pattern("ssffsf")},
}


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_llama_cpp_computes_it(llama: Any, fixture_dir: Path, tmp_path: Path, change: Mapping[str, Any]) -> None:
    """Past a window of 32. llama.cpp's GELU is a float16 table: the largest difference without any change is 0.003."""
    ids = np.load(next(fixture_dir.glob("heldout*.npy"))).reshape(-1)[:140].astype(np.int64)
    with registry.open_checkpoint(fixture_dir) as source:
        plain = built_in_logits(source, ids)
        source.config = dataclasses.replace(source.config, sliding_window=32, **change)
        truth = built_in_logits(source, ids)
        (path,) = write(GGUF().layout(source, options(dtype="f32")), tmp_path)
    _, expected = llama.logits(path, ids.tolist())
    assert np.abs(plain - truth).max() > 1
    assert np.abs(expected - truth).max() < 0.02
    with GGUF().open(path) as back:
        assert np.abs(built_in_logits(back, ids) - truth).max() < 5e-5
