"""tokenizer.json against tokenizer.json, and against what it was made from."""

from __future__ import annotations

import dataclasses
import json

import pytest

from gemma2tool.formats import registry
from gemma2tool.verify.compare.tokenizer import compare_tokenizers
from gemma2tool.verify.diagnosis.tokenizer import causes_of_tokenizer
from tests.support.tokenizers import derived_json, side, through_gguf, trained


def gemma_json(**changes: object) -> dict:
    """A tokenizer.json of Gemma's shape."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    put, text = {"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    vocab = {"<bos>": 0, "<unk>": 1, "<turn>": 2, "a": 3, "b": 4, "ab": 5, "\u2581": 6, "<mask>": 7}
    vocab |= {f"<0x{byte:02X}>": 8 + byte for byte in range(256)}
    model = {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [["a", "b"]],
    }
    content = {
        "added_tokens": [
            {"id": i, "content": text, "special": True, **flags}
            for i, text in ((0, "<bos>"), (2, "<turn>"), (7, "<mask>"))
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [put, text],
            "pair": [put, text, put, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [0], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": model | changes.pop("model", {}),
    }
    return content | changes


def added(index: int, **changes: object) -> list[dict]:
    """Gemma's added tokens with one changed, or without it."""
    tokens = gemma_json()["added_tokens"]
    return [*tokens[:index], *([tokens[index] | changes] if changes else []), *tokens[index + 1 :]]


BOS_AS_OTHER_ID = gemma_json()["post_processor"] | {
    "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}}
}

MERGED = {"model": {"merges": [["a", "b"], ["<0x41>", "b"]]}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "subject", "named"),
    [
        ({"normalizer": None}, "normalizer", "Replace, in the candidate none"),
        (
            {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "_"}},
            "normalizer",
            "other settings",
        ),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer", "Whitespace"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a|b"}, "behavior": "Isolated", "invert": False}},
            "pre_tokenizer",
            "Split",
        ),
        ({"decoder": None}, "decoder", "ByteFallback then Fuse, in the candidate none"),
        ({"decoder": {"type": "Sequence", "decoders": gemma_json()["decoder"]["decoders"][:2]}}, "decoder", "Fuse"),
        ({"added_tokens": added(1)}, "added_tokens", "lacks the added token '<turn>' (2)"),
        ({"added_tokens": added(1, content="<tern>")}, "added_tokens", "'<turn>' (2), in the candidate '<tern>'"),
        ({"added_tokens": added(1, id=3)}, "added_tokens", "lacks the added token '<turn>' (2)"),
        (
            {"added_tokens": [*added(1, special=True), {"id": 5, "content": "ab", "special": False}]},
            "added_tokens",
            "additional added token",
        ),
        *(
            ({"added_tokens": added(1, **{flag: True})}, "added_tokens", f"'<turn>' (2) of tokenizer.json has {flag}")
            for flag in ("lstrip", "rstrip", "single_word")
        ),
        ({"added_tokens": added(1, special=False)}, "added_tokens.special", "special True, in the candidate False"),
        ({"post_processor": None}, "add_bos_token", "add_bos_token is True, in the candidate False"),
        ({"post_processor": BOS_AS_OTHER_ID}, "post_processor", "<bos> [0] around a text, in the candidate <bos> [1]"),
        ({"model": {"byte_fallback": False}}, "tokenizer.json", "byte_fallback"),
        ({"model": {"fuse_unk": False}}, "tokenizer.json", "fuse_unk"),
        ({"model": {"unk_token": "a"}}, "tokenizer.json", "unk_token"),
        ({"model": {"ignore_merges": True}}, "tokenizer.json", "ignore_merges"),
        ({"model": {"dropout": 0.5}}, "tokenizer.json", "dropout"),
        ({"model": {"type": "Unigram"}}, "tokenizer.json", "type"),
        (MERGED, "tokenizer.json", "merges"),
    ],
)
def test_a_tokenizer_json_that_gives_other_ids_or_texts_fails(
    model: bytes, changes: dict, subject: str, named: str
) -> None:
    """Beside the same tokenizer.model, which says nothing of it."""
    source, candidate = (
        side(tokenizer__model=model, tokenizer__json=content) for content in (gemma_json(), gemma_json(**changes))
    )
    gate = compare_tokenizers(source, candidate)
    wrong = [finding for finding in gate.findings if finding.severity == "error"]
    assert gate.failed and [finding.subject for finding in wrong][:1] == [subject]
    assert any(word in wrong[0].message for word in named.split("|")), wrong[0].message


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": None},  # no space is left to cut at
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}},
        {"normalizer": {"type": "Sequence", "normalizers": [gemma_json()["normalizer"]]}},
        {"normalizer": gemma_json()["normalizer"] | {"pattern": {"Regex": " "}}},
        {"post_processor": {"type": "Sequence", "processors": [{"type": "ByteLevel"}, gemma_json()["post_processor"]]}},
        {"model": {"dropout": None, "continuing_subword_prefix": "", "merges": ["a b"]}},
        {"model": {"unk_token": None}},  # each byte has a piece
        {"model": {"merges": [["a", "b"], ["<tu", "rn>"]]}},  # found in a text before anything is merged
        {"version": "1.0", "truncation": None, "padding": None},
        {"added_tokens": added(1, normalized=True)},  # transformers' add_tokens; a GGUF cannot represent it
    ],
)
def test_other_spellings_of_the_same_tokenizer_json_pass(changes: dict) -> None:
    source, candidate = side(tokenizer__json=gemma_json()), side(tokenizer__json=gemma_json(**changes))
    assert not compare_tokenizers(source, candidate).findings and not compare_tokenizers(candidate, source).findings


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"added_tokens": added(1)},
        {"added_tokens": added(1, single_word=True)},
        {"added_tokens": added(1, normalized=True)},
        {"pre_tokenizer": None},
        {"normalizer": gemma_json()["normalizer"] | {"pattern": {"Regex": " "}}},
        {"model": {"unk_token": None}},
        {"model": {"merges": [["a", "b"], ["<", "turn>"]]}},
        {"post_processor": None},
        {"post_processor": BOS_AS_OTHER_ID},
        {"decoder": None},
    ],
)
def test_the_verdict_is_that_of_the_library_that_runs_the_files(changes: dict) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    sides = [gemma_json(), gemma_json(**changes)]
    answers = []
    for content in sides:
        content["model"]["vocab"] |= {"<": 264, "turn>": 265, "\u2581b": 266}
        content["model"]["merges"] = [*content["model"]["merges"], ["\u2581", "b"]]
        run = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0"} | content))
        ids = [run.encode(text).ids for text in ("ab a  b", "a<turn>b ab", "x<turn>", "\u00e9<mask> ")]
        answers.append((ids, run.decode([3, 6, 4, 8 + 0xC3, 8 + 0xA9])))
    gate = compare_tokenizers(*(side(tokenizer__json=content) for content in sides))
    assert gate.failed == (answers[0] != answers[1])


@pytest.mark.parametrize("text", ["<mask>", "<unused12>", "<|im_end|>"])
def test_tokens_whose_flag_a_gguf_does_not_keep_are_reported(text: str) -> None:
    """llama.cpp's converter writes them as control tokens, whether they are special or not."""
    source, candidate = (gemma_json(added_tokens=added(1, content=text, special=flag)) for flag in (True, False))
    gate = compare_tokenizers(side(tokenizer__json=source), side(tokenizer__json=candidate))
    assert not gate.failed and {finding.severity for finding in gate.findings} == {"warning"}
    assert text in gate.findings[0].message


def test_a_token_that_is_special_on_one_side_only_is_the_cause_of_other_decoded_texts() -> None:
    candidate = gemma_json(added_tokens=added(1, special=False))
    gate = compare_tokenizers(side(tokenizer__json=gemma_json()), side(tokenizer__json=candidate))
    (cause,) = causes_of_tokenizer([gate])
    assert cause.id == "tokenizer.wrong" and "a decoded text leaves out other tokens" in cause.message


@pytest.mark.parametrize("name", ["truncation", "padding"])
def test_limits_that_transformers_resets_are_reported(name: str) -> None:
    gate = compare_tokenizers(
        side(tokenizer__json=gemma_json()), side(tokenizer__json=gemma_json(**{name: {"max_length": 8}}))
    )
    assert not gate.failed and [finding.subject for finding in gate.findings] == [name]


def test_runs_of_spaces_that_a_gguf_merges_are_reported() -> None:
    """A GGUF is merged as tokenizer.model would; between two files that list their merges it is an error."""
    model = trained(user_defined_symbols=["\u2581\u2581"])
    whole = json.loads(derived_json(model))
    pairs = whole["model"]["merges"]
    single = whole | {"model": whole["model"] | {"merges": [pair for pair in pairs if pair != ["\u2581", "\u2581"]]}}
    assert len(single["model"]["merges"]) < len(pairs)
    source, candidate = (side(tokenizer__model=model, tokenizer__json=content) for content in (single, whole))
    assert compare_tokenizers(source, candidate).failed
    result = compare_tokenizers(source, through_gguf(source))
    assert not result.failed and "runs of spaces" in result.findings[0].message


def test_bos_that_tokenizer_json_no_longer_puts() -> None:
    puts, not_ = side(tokenizer__json=gemma_json()), side(tokenizer__json=gemma_json(post_processor=None))
    lost = compare_tokenizers(puts, not_)
    assert lost.failed and any(
        "puts <bos> [0] around a text, in the candidate nothing" in finding.message for finding in lost.errors
    )
    assert compare_tokenizers(not_, puts).failed
    supplied = side(
        tokenizer__json=gemma_json(post_processor=None),
        tokenizer_config__json={"add_bos_token": True, "bos_token": "<bos>"},
    )
    assert not compare_tokenizers(supplied, puts).failed, "transformers puts it by tokenizer_config.json"


def test_a_hostile_tokenizer_json_is_compared_all_the_same() -> None:
    source = side(tokenizer__json={"model": {"vocab": {"a": 0}}})
    odd = {
        "model": {"vocab": 3, "merges": [3]},
        "added_tokens": [{"id": []}, 7],
        "post_processor": {"single": [{"SpecialToken": 1}, 2]},
    }
    assert compare_tokenizers(source, side(tokenizer__json=odd)).failed


def tokenizer_json(vocab: dict[str, int], merges: list[object]) -> bytes:
    return json.dumps({"model": {"vocab": vocab, "merges": merges}}).encode()


@pytest.mark.parametrize(
    ("candidate", "status"),
    [
        (tokenizer_json({"a": 0, "b": 1}, ["a b"]), "passed"),
        (tokenizer_json({"b": 1, "a": 0}, [["a", "b"]]), "passed"),
        (tokenizer_json({"a": 1, "b": 0}, ["a b"]), "failed"),
        (tokenizer_json({"a": 0, "b": 1}, ["b a"]), "failed"),
        (b"{", "failed"),
    ],
)
def test_tokenizer_json_counts_too(model: bytes, candidate: bytes, status: str) -> None:
    """It is what transformers loads, whatever tokenizer.model says."""
    source = side(tokenizer__model=model, tokenizer__json=tokenizer_json({"a": 0, "b": 1}, ["a b"]))
    assert compare_tokenizers(source, side(tokenizer__model=model, tokenizer__json=candidate)).status == status


@pytest.mark.parametrize(("format", "reported"), [("hf", True), ("mlx", True), ("flax", False), ("gemma-cpp", False)])
def test_a_lost_tokenizer_json_is_reported(model: bytes, format: str, reported: bool) -> None:
    source = side(tokenizer__model=model, tokenizer__json=derived_json(model))
    gate = compare_tokenizers(source, dataclasses.replace(side(tokenizer__model=model), facts=registry.FACTS[format]))
    assert (
        not gate.failed
        and [finding.severity for finding in gate.findings] == ["warning"] * reported
        and ("protobuf" in gate.summary) == reported
    )
    only = compare_tokenizers(
        side(tokenizer__json=gemma_json()), dataclasses.replace(side(), facts=registry.FACTS[format])
    )
    assert [finding.subject for finding in only.findings] == ["tokenizer.json"] * reported
