"""Strict YAML: plain data or an error; and a model card never stops a conversion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemma2tool.containers import strict_yaml
from gemma2tool.errors import InputRefused
from gemma2tool.formats.gguf.metadata import metadata_keys
from gemma2tool.model.checkpoint import Assets, Checkpoint
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.hostile.refusal import assert_refused

yaml = pytest.importorskip("yaml")
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


def _load(text: str) -> object:
    return strict_yaml.load(text, what="here", max_chars=1 << 16)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: [x, 'y', 2.5, null, true]\nc:\n- d: e\n",
        "",
        "- no\n- 2001-01-01\n",
        "a: |\n  text\n  more\n",
        "? a\n: b\n",
    ],
)
def test_plain_data_equals_pyyaml_s(text: str) -> None:
    assert _load(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "id"),
    [
        (LAUGHS, "yaml.alias"),
        ("a: &a [*a]", "yaml.alias"),
        ("a: &a {b: 1}\nc: {<<: *a}", "yaml.alias"),
        ("!!python/object/apply:os.system ['true']", "yaml.tag"),
        ("a: !!timestamp x", "yaml.tag"),
        ("a: " + "[" * 100, "yaml.depth"),
        ("a: " + "9" * 10_000, "yaml.syntax"),
        ("a: [", "yaml.syntax"),
        ("a: 2001-13-45", "yaml.syntax"),
        ("a: \x1b[2J", "yaml.syntax"),
        ("{[]: 1}", "yaml.syntax"),
        ("a" * 70_000, "yaml.too-large"),
    ],
)
def test_refused(text: str, id: str) -> None:
    with pytest.raises(InputRefused):  # the first error imports codecs
        _load(text)
    assert_refused(lambda: _load(text), id)


@pytest.mark.parametrize(
    "front", [LAUGHS, "license: !!timestamp x\n", "base_model: [[[[1]]]]\n", "license: {a: b}\n", "tags: 5\n", "a: [\n"]
)
def test_a_model_card_never_stops_a_conversion(front: str) -> None:
    warnings: list[str] = []
    tensors = random_checkpoint(np.dtype(np.float32)).tensors
    checkpoint = Checkpoint(
        Path("gemma-2-tiny"),
        "hf",
        SMALL,
        tensors,
        Assets({"README.md": lambda: f"---\n{front}---\n# A card\n".encode()}),
    )
    keys = dict(metadata_keys(checkpoint, warnings))
    assert keys["general.name"].value
    assert all(line.isprintable() for line in warnings)
