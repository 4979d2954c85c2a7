"""The tokenizer of a preset: what keras-hub reads, and what it ignores and a conversion back needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma2tool.containers import tokenizer_model
from gemma2tool.containers.tokenizer_model import UNUSED, USER_DEFINED
from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.verify.compare.tokenizer import compare_tokenizers
from tests.support.assets import file_assets
from tests.support.formats import write_as

pytest.importorskip("h5py", reason="the keras extra is not installed")

THINK, PAUSE = 2036, 2040
"""Ids of tokens that a fine-tune added: one in the place of a piece, one beyond a shortened vocabulary."""
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def fine_tune(fixture_dir: Path) -> Iterator[Checkpoint]:
    """The fixture with a vocabulary of 2038 pieces, tokens that only tokenizer_config.json adds, and a template."""
    with registry.open_checkpoint(fixture_dir / "model.ckpt") as checkpoint:
        model = tokenizer_model.parse(checkpoint.assets["tokenizer.model"])
        added = {
            str(token): {"content": piece.text, "special": piece.type != USER_DEFINED or "_of_turn" in piece.text}
            for token, piece in enumerate(model.pieces[:2038])
            if piece.type in (tokenizer_model.CONTROL, tokenizer_model.UNKNOWN, USER_DEFINED)
        }
        added |= {
            str(THINK): {"content": "<think>", "special": True},
            str(PAUSE): {"content": "<pause>", "special": False},
        }
        shortened = tokenizer_model.encode(model.pieces[:2038], {"pad": 0, "eos": 1, "bos": 2, "unk": 3})
        config = {"added_tokens_decoder": added, "chat_template": TEMPLATE, "tokenizer_class": "GemmaTokenizer"}
        checkpoint.assets = file_assets(
            {"tokenizer.model": shortened, "tokenizer_config.json": json.dumps(config).encode()}
        )
        yield checkpoint


@pytest.mark.slow
def test_added_tokens_are_pieces_and_come_back(fine_tune: Checkpoint, tmp_path: Path) -> None:
    folder = write_as("keras", fine_tune, tmp_path / "preset")
    pieces = tokenizer_model.parse((folder / "assets" / "tokenizer" / "vocabulary.spm").read_bytes()).pieces
    assert [(pieces[token].text, pieces[token].type) for token in (THINK, PAUSE)] == [
        ("<think>", USER_DEFINED),
        ("<pause>", USER_DEFINED),
    ]
    assert len(pieces) == PAUSE + 1 and pieces[2038].type == UNUSED
    with registry.open_checkpoint(folder) as back:
        assert back.tokenizer.added_tokens[THINK].special is True
        assert back.tokenizer.added_tokens[PAUSE].special is False
        assert back.tokenizer.chat_template == TEMPLATE
        gate = compare_tokenizers(fine_tune, back)
    assert gate.status == "passed", gate.findings


@pytest.mark.peer
@pytest.mark.slow
def test_keras_hub_finds_added_tokens(fine_tune: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    hub = pytest.importorskip("keras_hub", reason="keras-hub is not installed")
    folder = write_as("keras", fine_tune, tmp_path / "preset")
    tokenizer = hub.models.GemmaTokenizer.from_preset(str(folder))
    ids = [int(token) for token in tokenizer("<think>a<pause>")]
    assert ids[0] == THINK and ids[-1] == PAUSE and THINK not in ids[1:]


@pytest.mark.slow
def test_a_tokenizer_without_additions_is_kept_byte_for_byte(fixture_dir: Path, tmp_path: Path) -> None:
    with registry.open_checkpoint(fixture_dir / "model.ckpt") as checkpoint:
        folder = write_as("keras", checkpoint, tmp_path / "preset")
        for name, kept in (("tokenizer.model", "assets/tokenizer/vocabulary.spm"), ("tokenizer_config.json",) * 2):
            assert (folder / kept).read_bytes() == checkpoint.assets[name]
