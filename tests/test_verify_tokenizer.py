"""Tokenizers that are the same, nearly the same, and not."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from tests_support import SMALL

from gemma2tool.model.checkpoint import Assets, Checkpoint
from gemma2tool.verify.result import GateResult
from gemma2tool.verify.tokenizer import chat_template, compare_tokenizers

sentencepiece = pytest.importorskip("sentencepiece")

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "a  b   c\n\n\nd 1234567890",
]


def trained(**options: object) -> bytes:
    """A small BPE tokenizer with byte fallback, as Gemma's is one."""
    written = io.BytesIO()
    settings = {
        "vocab_size": 330, "model_type": "bpe", "byte_fallback": True, "bos_id": 2, "eos_id": 1, "pad_id": 0, "unk_id": 3,
        "add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "identity",
        "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20), model_writer=written, **(settings | options)
    )
    return written.getvalue()


@pytest.fixture(scope="module")
def model() -> bytes:
    return trained()


def side(**files: bytes | dict | str) -> Checkpoint:
    """A checkpoint of no weights that carries these files; dots in names are written as underscores twice."""
    readers = {}
    for name, content in files.items():
        data = (
            content
            if isinstance(content, bytes)
            else json.dumps(content).encode()
            if isinstance(content, dict)
            else content.encode()
        )
        readers[name.replace("__", ".")] = lambda data=data: data
    return Checkpoint(Path("side"), "memory", SMALL, {}, Assets(readers))


def compare(ours: bytes, theirs: bytes) -> GateResult:
    return compare_tokenizers(side(tokenizer__model=ours), side(tokenizer__model=theirs))


def test_the_same_bytes_pass(model: bytes) -> None:
    found = compare(model, model)
    assert found.status == "passed" and found.metrics == {"identical": True}


def test_the_same_pieces_in_other_bytes_pass(model: bytes) -> None:
    unknown_field = model + b"\xda\x3f\x03abc"  # field 1019, length-delimited: ignored by every reader
    found = compare(model, unknown_field)
    assert found.status == "passed" and found.metrics["identical"] is False and not found.findings


def place_of_a_piece(model: bytes) -> tuple[int, str]:
    """Where a merged piece lies in the file (its text, then a byte 0x15 and the score), and its text."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    text = next(each for each in map(processor.id_to_piece, range(262, 330)) if each.isascii() and each.isalpha() and len(each) > 1)
    return model.index(bytes([0x0A, len(text)]) + text.encode() + b"\x15") + 2, text


def test_a_piece_that_differs_is_named(model: bytes) -> None:
    at, text = place_of_a_piece(model)
    found = compare(model, model[:at] + b"~" + model[at + 1 :])
    assert found.status == "failed" and f"{text!r}, in the candidate '~{text[1:]}'" in found.summary


def test_a_score_that_differs_is_named(model: bytes) -> None:
    at, text = place_of_a_piece(model)
    changed = bytearray(model)
    changed[at + len(text) + 3] ^= 0x40
    found = compare(model, bytes(changed))
    assert found.status == "failed" and any(finding.subject == "scores" for finding in found.findings)


def test_another_vocabulary_fails(model: bytes) -> None:
    found = compare(model, trained(vocab_size=320))
    assert found.status == "failed" and "pieces" in found.summary


def test_other_special_ids_fail(model: bytes) -> None:
    found = compare(model, trained(bos_id=1, eos_id=2))
    assert found.status == "failed"
    assert {"bos_id", "eos_id"} <= {finding.subject for finding in found.findings}


def test_another_normalization_shows_in_what_is_encoded(model: bytes) -> None:
    found = compare(model, trained(normalization_rule_name="nfkc"))
    assert found.status == "failed" and any(finding.subject == "encoding" for finding in found.findings)


def test_a_broken_file_is_a_finding_not_an_exception(model: bytes) -> None:
    for broken in (model[:40], b"", b"\xff" * 50):
        assert compare(model, broken).status == "failed"


def test_a_side_without_a_tokenizer_is_said(model: bytes) -> None:
    lost = compare_tokenizers(side(tokenizer__model=model), side())
    assert lost.status == "failed" and "the source's tokenizer is not in the candidate" in lost.summary
    found = compare_tokenizers(side(), side(tokenizer__model=model))
    assert found.status == "skipped" and "the source carries no tokenizer.model" in found.summary
    assert "neither side" in compare_tokenizers(side(), side()).summary


def test_a_file_of_weights_alone_has_no_tokenizer_to_lose(model: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    file.touch()
    weights = dataclasses.replace(side(), path=file, format="gemma-pytorch")
    found = compare_tokenizers(side(tokenizer__model=model), weights)
    assert found.status == "skipped" and "weights alone" in found.summary


def test_special_tokens_in_the_midst_of_text(model: bytes) -> None:
    """A token that is found in text on one side and spelled out on the other: the vocabulary is the same."""
    ours, theirs = trained(user_defined_symbols=["<turn>"]), trained(control_symbols=["<turn>"])
    found = compare(ours, theirs)
    subjects = {finding.subject for finding in found.findings if finding.severity == "error"}
    assert found.status == "failed" and "encoding" in subjects
    assert any("<turn>" in finding.message for finding in found.findings)


@pytest.mark.parametrize(("ours", "theirs", "status"), [
    ({"added_tokens_decoder": {"5": {"content": "<a>"}}}, {"added_tokens_decoder": {"5": {"content": "<b>"}}}, "failed"),
    ({"added_tokens_decoder": {"5": {"content": "<a>"}}}, {"added_tokens_decoder": {"6": {"content": "<b>"}}}, "passed"),
    ({"bos_token": "<bos>"}, {"bos_token": {"content": "<bos>", "special": True}}, "passed"),
    ({"bos_token": "<bos>"}, {"bos_token": "<s>"}, "failed"),
    ({"pad_token": "<pad>"}, {"pad_token": "<eos>"}, "passed"),
    ({"added_tokens_decoder": [1], "bos_token": 3}, {"added_tokens_decoder": {"x": 1}, "bos_token": []}, "passed"),
])  # fmt: skip
def test_special_tokens_of_the_config(model: bytes, ours: dict, theirs: dict, status: str) -> None:
    sides = (side(tokenizer__model=model, tokenizer_config__json=each) for each in (ours, theirs))
    assert compare_tokenizers(*sides).status == status


@pytest.mark.parametrize(("ours", "theirs", "status"), [
    ([1, 107], 1, "failed"), (1, [107, 1], "passed"), ([1, 107], [107, 1], "passed"), ("x", 1, "passed"), ([[]], 1, "passed"),
])  # fmt: skip
def test_a_stop_that_generation_config_loses_fails(model: bytes, ours: object, theirs: object, status: str) -> None:
    sides = (
        side(tokenizer__model=model, generation_config__json={"eos_token_id": each}) for each in (ours, theirs)
    )
    assert compare_tokenizers(*sides).status == status


@pytest.mark.parametrize("step", ["normalizer", "pre_tokenizer", "decoder"])
def test_steps_of_tokenizer_json_that_are_written_otherwise_are_told(step: str) -> None:
    ours, theirs = (side(tokenizer__json={"model": {"vocab": {"a": 0}}, step: {"type": kind}}) for kind in "xy")
    found = compare_tokenizers(ours, theirs)
    assert not found.failed and [each.severity for each in found.findings] == ["warning"] and step in found.findings[0].message


def test_bos_that_tokenizer_json_no_longer_puts() -> None:
    bos = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<bos>"}}, {"Sequence": {"id": "A"}}]}
    puts, nested, not_ = (
        side(tokenizer__json={"model": {"vocab": {"a": 0}}, "post_processor": each})
        for each in (bos, {"type": "Sequence", "processors": [{"type": "x"}, bos]}, None)
    )
    lost = compare_tokenizers(puts, not_)
    assert lost.failed and "puts <bos> around a text, in the candidate nothing" in lost.summary
    assert not compare_tokenizers(not_, puts).failed and not compare_tokenizers(puts, nested).findings


def test_a_hostile_tokenizer_json_is_compared_all_the_same() -> None:
    ours = side(tokenizer__json={"model": {"vocab": {"a": 0}}})
    odd = {"model": {"vocab": 3, "merges": [3]}, "added_tokens": [{"id": []}, 7], "post_processor": {"single": [{"SpecialToken": 1}, 2]}}
    assert compare_tokenizers(ours, side(tokenizer__json=odd)).failed


def tokenizer_json(vocab: dict[str, int], merges: list[object]) -> bytes:
    return json.dumps({"model": {"vocab": vocab, "merges": merges}}).encode()


@pytest.mark.parametrize(
    ("theirs", "status"),
    [
        (tokenizer_json({"a": 0, "b": 1}, ["a b"]), "passed"),
        (tokenizer_json({"b": 1, "a": 0}, [["a", "b"]]), "passed"),
        (tokenizer_json({"a": 1, "b": 0}, ["a b"]), "failed"),
        (tokenizer_json({"a": 0, "b": 1}, ["b a"]), "failed"),
        (b"{", "failed"),
    ],
)
def test_tokenizer_json_counts_too(model: bytes, theirs: bytes, status: str) -> None:
    """It is what transformers loads, whatever tokenizer.model says."""
    ours = tokenizer_json({"a": 0, "b": 1}, ["a b"])
    source = side(tokenizer__model=model, tokenizer__json=ours)
    assert compare_tokenizers(source, side(tokenizer__model=model, tokenizer__json=theirs)).status == status


@pytest.mark.parametrize(("ours", "theirs", "status", "severity"), [
    ("{{a}}", "{{a}}", "passed", None), ("{{a}}", "{{b}}", "failed", "error"), ("{{a}}", None, "passed", "warning"), (None, "{{a}}", "passed", None),
])  # fmt: skip
def test_chat_templates(model: bytes, ours: str | None, theirs: str | None, status: str, severity: str | None) -> None:
    left = side(tokenizer__model=model, **({"tokenizer_config__json": {"chat_template": ours}} if ours else {}))
    right = side(tokenizer__model=model, **({"chat_template__jinja": theirs} if theirs else {}))
    found = compare_tokenizers(left, right)
    assert found.status == status
    assert [finding.severity for finding in found.findings] == ([severity] if severity else [])


def test_named_templates_and_damaged_files() -> None:
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    assert chat_template(side(tokenizer_config__json={"chat_template": named}).assets) == "d"
    assert chat_template(side(tokenizer_config__json="not json").assets) is None
    assert chat_template(side(tokenizer_config__json="[1]").assets) is None


def test_whether_bos_is_added_must_agree(model: bytes) -> None:
    left, right = (
        side(tokenizer__model=model, tokenizer_config__json={"add_bos_token": value}) for value in (True, False)
    )
    found = compare_tokenizers(left, right)
    assert found.status == "failed" and "add_bos_token" in found.summary
