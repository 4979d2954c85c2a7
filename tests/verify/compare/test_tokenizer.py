"""Tokenizers that are the same, nearly the same, and not."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.gguf.format import GGUF
from gemma2tool.formats.gguf.key_values import KeyReader
from gemma2tool.formats.gguf.read_tokenizer import tokenizer_assets
from gemma2tool.formats.gguf.tokenizer_keys import tokenizer_keys
from gemma2tool.formats.tokenizers.tokenizer_json import tokenizer_json as tokenizer_json_of
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.format_facts import FormatFacts
from gemma2tool.verify.compare.tokenizer import compare_tokenizers
from gemma2tool.verify.finding import GateResult
from tests.support.assets import file_assets
from tests.support.checkpoints import SMALL

CONFIG = dataclasses.replace(SMALL, vocab_size=330)

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
        "vocab_size": 330,
        "model_type": "bpe",
        "byte_fallback": True,
        "bos_id": 2,
        "eos_id": 1,
        "pad_id": 0,
        "unk_id": 3,
        "bos_piece": "<bos>",
        "eos_piece": "<eos>",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20), model_writer=written, **(settings | options)
    )
    return written.getvalue()


@pytest.fixture(scope="module")
def model() -> bytes:
    return trained()


def side(**files: bytes | dict | str) -> Checkpoint:
    """A checkpoint of no weights that carries these files; dots in names are written as underscores twice."""
    named = {}
    for name, content in files.items():
        text = json.dumps(content) if isinstance(content, dict) else content
        named[name.replace("__", ".")] = text if isinstance(text, bytes) else text.encode()
    return Checkpoint(Path("side"), FormatFacts("memory"), CONFIG, {}, file_assets(named))


def derived_json(model: bytes) -> bytes:
    """The tokenizer.json of a tokenizer.model."""
    return tokenizer_json_of(side(tokenizer__model=model).tokenizer)


def through_gguf(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint's tokenizer as it comes back from a GGUF."""
    kv = dict(tokenizer_keys(checkpoint.tokenizer, checkpoint.config).kv)
    return Checkpoint(
        Path("side.gguf"), GGUF.facts, checkpoint.config, {}, tokenizer_assets(KeyReader(kv, "side.gguf"))
    )


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
    text = next(
        each
        for each in map(processor.id_to_piece, range(262, 330))
        if each.isascii() and each.isalpha() and len(each) > 1
    )
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
    assert {"bos_id", "eos_id", "pieces", "encoding"} <= {finding.subject for finding in found.findings}


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
    assert found.status == "skipped" and "the source has no vocabulary" in found.summary
    assert "neither side" in compare_tokenizers(side(), side()).summary


def test_a_file_of_weights_alone_has_no_tokenizer_to_lose(model: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    file.touch()
    weights = dataclasses.replace(side(), path=file, facts=registry.FACTS["gemma-pytorch"])
    found = compare_tokenizers(side(tokenizer__model=model), weights)
    assert found.status == "skipped" and "weights alone" in found.summary


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
    ("ours", "theirs", "status"),
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
def test_special_tokens_of_the_config(model: bytes, ours: dict, theirs: dict, status: str) -> None:
    sides = (side(tokenizer__model=model, tokenizer_config__json=each) for each in (ours, theirs))
    assert compare_tokenizers(*sides).status == status


@pytest.mark.parametrize(
    ("ours", "theirs", "status"),
    [
        ([1, 107], 1, "failed"),
        (1, [107, 1], "passed"),
        ([1, 107], [107, 1], "passed"),
        ("x", 1, "passed"),
        ([[]], 1, "passed"),
    ],
)
def test_a_stop_that_generation_config_loses_fails(model: bytes, ours: object, theirs: object, status: str) -> None:
    sides = (side(tokenizer__model=model, generation_config__json={"eos_token_id": each}) for each in (ours, theirs))
    assert compare_tokenizers(*sides).status == status


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
            for flag in ("lstrip", "rstrip", "single_word", "normalized")
        ),
        ({"added_tokens": added(1, special=False)}, "added_tokens", "special True, in the candidate False"),
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
    ours, theirs = (
        side(tokenizer__model=model, tokenizer__json=each) for each in (gemma_json(), gemma_json(**changes))
    )
    found = compare_tokenizers(ours, theirs)
    wrong = [each for each in found.findings if each.severity == "error"]
    assert found.failed and [each.subject for each in wrong][:1] == [subject]
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
    ],
)
def test_other_spellings_of_the_same_tokenizer_json_pass(changes: dict) -> None:
    ours, theirs = side(tokenizer__json=gemma_json()), side(tokenizer__json=gemma_json(**changes))
    assert not compare_tokenizers(ours, theirs).findings and not compare_tokenizers(theirs, ours).findings


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"added_tokens": added(1)},
        {"added_tokens": added(1, single_word=True)},
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
    told = []
    for each in sides:
        each["model"]["vocab"] |= {"<": 264, "turn>": 265, "\u2581b": 266}
        each["model"]["merges"] = [*each["model"]["merges"], ["\u2581", "b"]]
        run = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0"} | each))
        ids = [run.encode(text).ids for text in ("ab a  b", "a<turn>b ab", "x<turn>", "\u00e9<mask> ")]
        told.append((ids, run.decode([3, 6, 4, 8 + 0xC3, 8 + 0xA9])))
    found = compare_tokenizers(*(side(tokenizer__json=each) for each in sides))
    assert found.failed == (told[0] != told[1])


def test_tokens_whose_flag_a_gguf_does_not_keep_are_told() -> None:
    found = compare_tokenizers(
        side(tokenizer__json=gemma_json()), side(tokenizer__json=gemma_json(added_tokens=added(2, special=False)))
    )
    assert (
        not found.failed
        and {each.severity for each in found.findings} == {"warning"}
        and "<mask>" in found.findings[0].message
    )


@pytest.mark.parametrize("name", ["truncation", "padding"])
def test_limits_that_transformers_sets_anew_are_told(name: str) -> None:
    found = compare_tokenizers(
        side(tokenizer__json=gemma_json()), side(tokenizer__json=gemma_json(**{name: {"max_length": 8}}))
    )
    assert not found.failed and [each.subject for each in found.findings] == [name]


def test_runs_of_spaces_that_a_gguf_merges_are_told() -> None:
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
        "puts <bos> [0] around a text, in the candidate nothing" in each.message for each in lost.errors
    )
    assert compare_tokenizers(not_, puts).failed
    supplied = side(
        tokenizer__json=gemma_json(post_processor=None),
        tokenizer_config__json={"add_bos_token": True, "bos_token": "<bos>"},
    )
    assert not compare_tokenizers(supplied, puts).failed, "transformers puts it by tokenizer_config.json"


def test_a_hostile_tokenizer_json_is_compared_all_the_same() -> None:
    ours = side(tokenizer__json={"model": {"vocab": {"a": 0}}})
    odd = {
        "model": {"vocab": 3, "merges": [3]},
        "added_tokens": [{"id": []}, 7],
        "post_processor": {"single": [{"SpecialToken": 1}, 2]},
    }
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


@pytest.mark.parametrize(
    ("ours", "theirs", "status", "severity"),
    [
        ("{{a}}", "{{a}}", "passed", None),
        ("{{a}}", "{{b}}", "failed", "error"),
        ("{{a}}", None, "passed", "warning"),
        (None, "{{a}}", "passed", None),
    ],
)
def test_chat_templates(model: bytes, ours: str | None, theirs: str | None, status: str, severity: str | None) -> None:
    left = side(tokenizer__model=model, **({"tokenizer_config__json": {"chat_template": ours}} if ours else {}))
    right = side(tokenizer__model=model, **({"chat_template__jinja": theirs} if theirs else {}))
    found = compare_tokenizers(left, right)
    assert found.status == status
    assert [finding.severity for finding in found.findings] == ([severity] if severity else [])


@pytest.mark.parametrize(
    ("format", "path", "status"),
    [
        ("hf", "out", "failed"),
        ("hf-bin", "out", "failed"),
        ("mlx", "out", "failed"),
        ("gguf", "out.gguf", "failed"),
        ("hf", "model.safetensors", "passed"),
        ("hf-bin", "pytorch_model.bin", "passed"),
        ("gemma-pytorch", "out.ckpt", "passed"),
        ("flax", "out", "passed"),
        ("keras", "out", "passed"),
        ("gemma-cpp", "out.sbs", "passed"),
    ],
)
def test_a_chat_template_is_lost_where_there_is_a_place_for_it(
    model: bytes, format: str, path: str, status: str
) -> None:
    source = side(tokenizer__model=model, tokenizer_config__json={"chat_template": "{{a}}"})
    found = compare_tokenizers(
        source, dataclasses.replace(side(tokenizer__model=model), facts=registry.FACTS[format], path=Path(path))
    )
    assert found.status == status and "chat template is not in the candidate" in found.summary


@pytest.mark.parametrize(("format", "told"), [("hf", True), ("mlx", True), ("flax", False), ("gemma-cpp", False)])
def test_a_lost_tokenizer_json_is_told(model: bytes, format: str, told: bool) -> None:
    source = side(tokenizer__model=model, tokenizer__json=derived_json(model))
    found = compare_tokenizers(source, dataclasses.replace(side(tokenizer__model=model), facts=registry.FACTS[format]))
    assert (
        not found.failed
        and [each.severity for each in found.findings] == ["warning"] * told
        and ("protobuf" in found.summary) == told
    )
    only = compare_tokenizers(
        side(tokenizer__json=gemma_json()), dataclasses.replace(side(), facts=registry.FACTS[format])
    )
    assert [each.subject for each in only.findings] == ["tokenizer.json"] * told


def test_named_templates_and_damaged_files() -> None:
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    assert side(tokenizer_config__json={"chat_template": named}).tokenizer.chat_template == "d"
    for damaged in ("not json", "[1]"):
        result = compare_tokenizers(side(), side(tokenizer_config__json=damaged))
        assert result.failed and "the candidate's tokenizer cannot be read" in result.summary


def test_whether_bos_is_added_must_agree(model: bytes) -> None:
    left, right = (
        side(tokenizer__model=model, tokenizer_config__json={"add_bos_token": value}) for value in (True, False)
    )
    found = compare_tokenizers(left, right)
    assert found.status == "failed" and "add_bos_token" in found.summary
