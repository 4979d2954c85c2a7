"""A tokenizer.json without a tokenizer.model, in formats that have a place for SentencePiece's model alone."""

from __future__ import annotations

import dataclasses
import json

import pytest

from gemma2tool.containers import tokenizer_model
from gemma2tool.formats.keras.tokenizer import tokenizer_files
from gemma2tool.formats.tokenizers.writing import sentencepiece_file, tokenizer_model_file
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.verify.compare.tokenizer import DIFFICULT, compare_tokenizers
from tests.support.tokenizers import derived_json, side, trained


def json_alone(**changes: object) -> Checkpoint:
    """A checkpoint with a trained tokenizer's tokenizer.json; ``changes`` in its model."""
    content = json.loads(derived_json(trained()))
    content["model"] |= changes
    return side(tokenizer__json=content)


def test_the_model_is_made_from_tokenizer_json() -> None:
    source = json_alone()
    made = sentencepiece_file(source)
    assert made.data is not None and not made.lost
    assert compare_tokenizers(source, side(tokenizer__model=made.data)).status == "passed"
    warnings: list[str] = []
    assert tokenizer_files(source, warnings)["tokenizer.model"] == made.data and not warnings


def test_its_own_model_is_carried_as_it_is() -> None:
    model = trained()
    assert sentencepiece_file(side(tokenizer__model=model, tokenizer__json=derived_json(model))).data == model


@pytest.mark.parametrize("changes", [{"merges": []}, {"dropout": 0.1}, {"byte_fallback": False}], ids=str)
def test_what_no_model_can_be_is_named(changes: dict[str, object]) -> None:
    made = sentencepiece_file(json_alone(**changes))
    assert made.data is None and "left behind" in made.lost
    warnings: list[str] = []
    assert "tokenizer.model" not in tokenizer_files(json_alone(**changes), warnings)
    assert len(warnings) == 1 and "left behind" in warnings[0]


def test_a_source_without_a_tokenizer_is_named() -> None:
    assert sentencepiece_file(side()).lost == "the source has no tokenizer"


@pytest.mark.peer
def test_both_libraries_give_the_same_ids() -> None:
    sentencepiece, tokenizers = pytest.importorskip("sentencepiece"), pytest.importorskip("tokenizers")
    source = json_alone()
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_file(source).data)
    bpe = tokenizers.Tokenizer.from_str(source.assets["tokenizer.json"].decode())
    for text in DIFFICULT:
        if "<" not in text:
            assert model.encode(text) == bpe.encode(text, add_special_tokens=False).ids, text


def test_an_added_padding_token_has_no_piece() -> None:
    tokenizer = json_alone().tokenizer
    added = dataclasses.replace(tokenizer, roles={**tokenizer.roles, "pad": len(tokenizer.pieces)})
    model = tokenizer_model.parse(tokenizer_model_file(added))
    assert len(model.pieces) == len(tokenizer.pieces)
