"""Tokenizers that are the same, nearly the same, and not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import sentencepiece

from gemma2tool.formats import registry
from gemma2tool.verify.compare.tokenizer import compare_tokenizers
from tests.support.tokenizers import compare, side, trained


def test_the_same_bytes_pass(model: bytes) -> None:
    gate = compare(model, model)
    assert gate.status == "passed" and gate.metrics == {"identical": True}


def test_the_same_pieces_in_other_bytes_pass(model: bytes) -> None:
    unknown_field = model + b"\xda\x3f\x03abc"  # field 1019, length-delimited: ignored by every reader
    gate = compare(model, unknown_field)
    assert gate.status == "passed" and gate.metrics["identical"] is False and not gate.findings


def place_of_a_piece(model: bytes) -> tuple[int, str]:
    """Where a merged piece lies in the file (its text, then a byte 0x15 and the score), and its text."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    text = next(
        piece
        for piece in map(processor.id_to_piece, range(262, 330))
        if piece.isascii() and piece.isalpha() and len(piece) > 1
    )
    return model.index(bytes([0x0A, len(text)]) + text.encode() + b"\x15") + 2, text


def test_a_piece_that_differs_is_named(model: bytes) -> None:
    at, text = place_of_a_piece(model)
    gate = compare(model, model[:at] + b"~" + model[at + 1 :])
    assert gate.status == "failed" and f"{text!r}, in the candidate '~{text[1:]}'" in gate.summary


def test_a_score_that_differs_is_named(model: bytes) -> None:
    at, text = place_of_a_piece(model)
    changed = bytearray(model)
    changed[at + len(text) + 3] ^= 0x40
    gate = compare(model, bytes(changed))
    assert gate.status == "failed" and any(finding.subject == "scores" for finding in gate.findings)


def test_another_vocabulary_fails(model: bytes) -> None:
    gate = compare(model, trained(vocab_size=320))
    assert gate.status == "failed" and "pieces" in gate.summary


def test_other_special_ids_fail(model: bytes) -> None:
    gate = compare(model, trained(bos_id=1, eos_id=2))
    assert gate.status == "failed"
    assert {"bos_id", "eos_id", "pieces", "encoding"} <= {finding.subject for finding in gate.findings}


def test_another_normalization_shows_in_what_is_encoded(model: bytes) -> None:
    gate = compare(model, trained(normalization_rule_name="nfkc"))
    assert gate.status == "failed" and any(finding.subject == "encoding" for finding in gate.findings)


def test_a_broken_file_is_a_finding_not_an_exception(model: bytes) -> None:
    for broken in (model[:40], b"", b"\xff" * 50):
        assert compare(model, broken).status == "failed"


def test_a_side_without_a_tokenizer_is_reported(model: bytes) -> None:
    lost = compare_tokenizers(side(tokenizer__model=model), side())
    assert lost.status == "failed" and "the source's tokenizer is not in the candidate" in lost.summary
    gate = compare_tokenizers(side(), side(tokenizer__model=model))
    assert gate.status == "skipped" and "the source has no vocabulary" in gate.summary
    assert "neither side" in compare_tokenizers(side(), side()).summary


def test_a_file_of_weights_alone_has_no_tokenizer_to_lose(model: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    file.touch()
    weights = dataclasses.replace(side(), path=file, facts=registry.FACTS["gemma-pytorch"])
    gate = compare_tokenizers(side(tokenizer__model=model), weights)
    assert gate.status == "skipped" and "weights alone" in gate.summary


@pytest.mark.parametrize("name", ["maxtext", "flax"])
def test_a_folder_of_weights_alone_has_no_tokenizer_to_lose(model: bytes, name: str) -> None:
    """MaxText, Kauldron and gm.ckpts take the tokenizer from elsewhere, and save none."""
    gate = compare_tokenizers(side(tokenizer__model=model), dataclasses.replace(side(), facts=registry.FACTS[name]))
    assert gate.status == "skipped" and "weights alone" in gate.summary


def test_special_tokens_in_the_midst_of_text() -> None:
    """A token that is special on one side only: a decoded text has it on one side, and not on the other."""
    source, candidate = trained(user_defined_symbols=["<turn>"]), trained(control_symbols=["<turn>"])
    result = compare(source, candidate)
    assert result.failed and "the added token '<turn>' (4) has special False" in result.summary
    added = {"4": {"content": "<turn>", "special": True}}
    sides = (
        side(tokenizer__model=model, tokenizer_config__json={"added_tokens_decoder": decoder})
        for model, decoder in ((source, added), (source, {}))
    )
    result = compare_tokenizers(*sides)
    subjects = {finding.subject for finding in result.errors}
    assert result.failed and {"types", "encoding"} <= subjects


@pytest.mark.parametrize(
    ("before", "after", "status"),
    [
        (
            {"added_tokens_decoder": {"5": {"content": "<a>"}}},
            {"added_tokens_decoder": {"5": {"content": "<b>"}}},
            "failed",
        ),
        (
            {"added_tokens_decoder": {"5": {"content": "<a>"}}},
            {"added_tokens_decoder": {"6": {"content": "<b>"}}},
            "failed",
        ),
        ({"bos_token": "<bos>"}, {"bos_token": {"content": "<bos>", "special": True}}, "passed"),
        ({"bos_token": "<bos>"}, {"bos_token": "<eos>"}, "failed"),
        ({"pad_token": "<pad>"}, {"pad_token": "<eos>"}, "passed"),
        ({"added_tokens_decoder": [1], "bos_token": 3}, {"added_tokens_decoder": [], "bos_token": []}, "passed"),
    ],
)
def test_special_tokens_of_the_config(model: bytes, before: dict, after: dict, status: str) -> None:
    sides = (side(tokenizer__model=model, tokenizer_config__json=content) for content in (before, after))
    assert compare_tokenizers(*sides).status == status


@pytest.mark.parametrize(
    ("before", "after", "status"),
    [
        ([1, 107], 1, "failed"),
        (1, [107, 1], "passed"),
        ([1, 107], [107, 1], "passed"),
        ("x", 1, "passed"),
        ([[]], 1, "passed"),
    ],
)
def test_a_stop_that_generation_config_loses_fails(model: bytes, before: object, after: object, status: str) -> None:
    sides = (side(tokenizer__model=model, generation_config__json={"eos_token_id": stop}) for stop in (before, after))
    assert compare_tokenizers(*sides).status == status


def test_whether_bos_is_added_must_agree(model: bytes) -> None:
    left, right = (
        side(tokenizer__model=model, tokenizer_config__json={"add_bos_token": value}) for value in (True, False)
    )
    gate = compare_tokenizers(left, right)
    assert gate.status == "failed" and "add_bos_token" in gate.summary
