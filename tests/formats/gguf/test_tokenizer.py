"""Tokenizers into GGUF keys and back into files: whatever files a checkpoint has, llama.cpp and SentencePiece agree on
the ids.
"""

from __future__ import annotations

import json
from array import array
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm

from gemma2tool.containers import tokenizer_model
from gemma2tool.containers.tokenizer_model import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from gemma2tool.errors import InputRefused
from gemma2tool.formats.gguf import tokenizer_keys as keys_of_tokenizer
from gemma2tool.formats.gguf.format import GGUF
from gemma2tool.formats.gguf.key_values import KeyReader
from gemma2tool.formats.gguf.read_tokenizer import tokenizer_assets
from gemma2tool.formats.gguf.tokenizer_keys import TokenizerKeys
from gemma2tool.formats.tokenizers.reading import read_tokenizer
from gemma2tool.formats.tokenizers.tokenizer_json import merges
from gemma2tool.model.config import Gemma2Config
from tests.formats.gguf.conftest import ADDED
from tests.support.assets import file_assets
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.gguf import options, write

TEXT = (
    "The quick brown fox; def f(x):\n\n    return x  # \u00fcn\u00efc\u00f6d\u00e9 \u6f22\u5b57 \U0001f389"
    "\n\t<table> 12345"
)
FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
TURNS = ("<start_of_turn>", "<end_of_turn>")
CONFIG = {
    "bos_token": "<bos>",
    "eos_token": {"content": "<eos>"},
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "add_bos_token": True,
    "add_eos_token": False,
    "chat_template": "{{ bos_token }}<start_of_turn>user\n{{ messages[0]['content'] }}<end_of_turn>\n",
}
# -- a tokenizer of Gemma's kind
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(gemma_like_model: bytes) -> bytes:
    return gemma_like_model


def added_decoder() -> dict[str, dict]:
    names = ("<pad>", "<eos>", "<bos>", "<unk>", *ADDED)
    return {str(i): {"content": name, "special": i < 4 or name in TURNS} for i, name in enumerate(names)}


def tokenizer_json(model: bytes) -> dict:
    """The tokenizer.json of a SentencePiece BPE: its merges are all the ways to make a piece of two,
    best piece first.
    """
    pieces = tokenizer_model.parse(model).pieces
    vocab = {piece.text: token for token, piece in enumerate(pieces)}
    merges = []
    for piece in sorted((p for p in pieces if p.type == NORMAL), key=lambda p: -p.score):
        cuts = [(piece.text[:at], piece.text[at:]) for at in range(1, len(piece.text))]
        merges += [list(cut) for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    bos, a, b = {"SpecialToken": {"id": "<bos>"}}, {"Sequence": {"id": "A"}}, {"Sequence": {"id": "B"}}
    return {
        "added_tokens": [{"id": int(i), **entry} for i, entry in added_decoder().items()],
        "post_processor": {"type": "TemplateProcessing", "single": [bos, a], "pair": [bos, a, bos, b]},
        "model": {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": vocab, "merges": merges},
    }


def assets_of(model: bytes, *names: str, **changes: object) -> dict[str, bytes]:
    config = CONFIG | {"added_tokens_decoder": added_decoder()}
    contents = {
        "tokenizer.model": model,
        "tokenizer.json": tokenizer_json(model),
        "tokenizer_config.json": config | changes,
    }
    return {
        name: data if isinstance(data, bytes) else json.dumps(data).encode()
        for name, data in contents.items()
        if name in names
    }


def config_of(size: int = 500, **fields: object) -> Gemma2Config:
    return Gemma2Config(vocab_size=size, **fields)


def tokenizer_keys(assets: dict[str, bytes], config: Gemma2Config) -> TokenizerKeys:
    return keys_of_tokenizer.tokenizer_keys(read_tokenizer(assets, config), config)


def keys_of(assets: dict[str, bytes], config: Gemma2Config | None = None) -> dict[str, object]:
    result = {}
    for key, value in tokenizer_keys(assets, config or config_of()).kv:
        result[key] = list(value.value) if isinstance(value.value, (list, array)) else value.value
    return result


# -- SentencePiece's file
# -------------------------------------------------------------------------------------------------------


def test_pieces_as_the_library_sees_them(trained: bytes) -> None:
    library = spm.SentencePieceProcessor(model_proto=trained)
    pieces = tokenizer_model.parse(trained).pieces
    assert len(pieces) == library.vocab_size()
    for token, piece in enumerate(pieces):
        assert piece.text == library.id_to_piece(token)
        assert np.float32(piece.score).tobytes() == np.float32(library.get_score(token)).tobytes()
        assert (piece.type == UNKNOWN) == library.is_unknown(token)
        assert (piece.type == CONTROL) == library.is_control(token)
        assert (piece.type == BYTE) == library.is_byte(token)
    assert [piece.text for piece in pieces if piece.type == USER_DEFINED] == list(ADDED)


def test_a_written_model_encodes_alike(trained: bytes) -> None:
    pieces = tokenizer_model.parse(trained).pieces
    again = tokenizer_model.encode(pieces, {"unk": 3, "bos": 2, "eos": 1, "pad": 0})
    assert tokenizer_model.parse(again).pieces == pieces
    first, second = spm.SentencePieceProcessor(model_proto=trained), spm.SentencePieceProcessor(model_proto=again)
    assert second.encode(TEXT) == first.encode(TEXT) and second.decode(second.encode(TEXT)) == TEXT
    assert [second.pad_id(), second.eos_id(), second.bos_id(), second.unk_id()] == [0, 1, 2, 3]


@pytest.mark.parametrize("cut", [1, 7, 100, 1000, 5000])
def test_damaged_models_are_refused(trained: bytes, cut: int) -> None:
    for data in (trained[:cut], b"\xff" * cut, b"version https://git-lfs.github.com/spec/v1\n" * cut):
        try:
            assert tokenizer_model.parse(data).pieces  # a cut between two pieces leaves a whole message
        except InputRefused as error:
            assert error.id == ("file.lfs-pointer" if data.startswith(b"version") else "sentencepiece.damaged")


# -- into GGUF
# ------------------------------------------------------------------------------------------------------------------


def test_types_and_scores_of_the_converter(trained: bytes) -> None:
    keys = keys_of(assets_of(trained, *FILES))
    types = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True))
    assert [types[name] for name in ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<unused0>", *TURNS)] == [
        CONTROL
    ] * 8
    assert [types[name] for name in ("\n\n", "  ", "<table>")] == [USER_DEFINED] * 3  # U+2581 became a space
    assert types["<0x0A>"] == BYTE
    scores = keys["tokenizer.ggml.scores"]
    assert scores[:11] == [-1000.0] * 11
    first = keys["tokenizer.ggml.token_type"].index(NORMAL)
    assert str(scores[first]) == "-0.0" and scores[first + 1] == -1.0
    assert list(keys)[5:] == [
        "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.unknown_token_id",
        "tokenizer.ggml.padding_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_sep_token",
        "tokenizer.ggml.add_eos_token", "tokenizer.chat_template", "tokenizer.ggml.add_space_prefix",
    ]  # fmt: skip
    assert not tokenizer_keys(assets_of(trained, *FILES), config_of()).warnings


@pytest.mark.parametrize("present", [FILES[1:], FILES[1:2], (FILES[0], FILES[2]), FILES[:2], FILES[:1]], ids=" ".join)
def test_fewer_files_give_the_same_vocabulary(trained: bytes, present: tuple[str, ...]) -> None:
    whole, less = keys_of(assets_of(trained, *FILES)), keys_of(assets_of(trained, *present))
    for key in ("tokens", "scores", "token_type", "bos_token_id", "eos_token_id", "padding_token_id", "add_bos_token"):
        assert less[f"tokenizer.ggml.{key}"] == whole[f"tokenizer.ggml.{key}"], key
    warnings = tokenizer_keys(assets_of(trained, *present), config_of()).warnings
    assert ("tokenizer.chat_template" in less) == ("tokenizer_config.json" in present)
    assert any("chat template" in warning for warning in warnings) == ("tokenizer_config.json" not in present)
    assert any("which tokens are special" in warning for warning in warnings) == (present == FILES[:1])


def test_the_template_file_counts_without_tokenizer_config(trained: bytes) -> None:
    assets = assets_of(trained, "tokenizer.model", "tokenizer.json") | {"chat_template.jinja": b"{{ messages }}"}
    assert keys_of(assets)["tokenizer.chat_template"] == "{{ messages }}"
    assert not tokenizer_keys(assets, config_of()).warnings


def test_an_eos_list_in_the_config(trained: bytes) -> None:
    """The converter leaves the key out: llama.cpp then never stops a base model."""
    config = config_of(eos_token_id=(1, 7))
    for present in (FILES[:1], (FILES[0], FILES[2]), FILES):
        assert keys_of(assets_of(trained, *present), config)["tokenizer.ggml.eos_token_id"] == 1


def test_named_templates(trained: bytes) -> None:
    choices = [{"name": "default", "template": "a"}, {"name": "tool use", "template": "b"}]
    keys = keys_of(assets_of(trained, *FILES, chat_template=choices))
    assert keys["tokenizer.chat_template"] == "a"
    assert keys["tokenizer.chat_template.tool_use"] == "b" and keys["tokenizer.chat_templates"] == ["tool_use"]


def test_vocabularies_of_other_sizes(trained: bytes) -> None:
    wide = keys_of(assets_of(trained, *FILES), config_of(503))
    assert wide["tokenizer.ggml.tokens"][500:] == ["[PAD500]", "[PAD501]", "[PAD502]"]
    assert wide["tokenizer.ggml.token_type"][500:] == [UNUSED] * 3
    narrow = tokenizer_keys(assets_of(trained, *FILES), config_of(490))
    assert any("ids up to 499" in warning for warning in narrow.warnings)


def test_the_old_spelling_of_the_tab_byte(trained: bytes) -> None:
    """transformers' Gemma converter put a tab in place of <0x09>."""
    content = tokenizer_json(trained)
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {"\t" if text == "<0x09>" else text: token for text, token in vocab.items()}
    assets = {"tokenizer.json": json.dumps(content).encode()}
    assert keys_of(assets)["tokenizer.ggml.tokens"] == keys_of(assets_of(trained, *FILES))["tokenizer.ggml.tokens"]


@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordPiece"},
        {"byte_fallback": False},
        {"vocab": {"a": 0, "b": 0}},
        {"vocab": {"a": 1}},
        {"vocab": {}},
        {"vocab": {"a": "0"}},
    ],
)
def test_other_tokenizers_are_refused(trained: bytes, model: dict) -> None:
    content = tokenizer_json(trained)
    content["model"] |= model
    with pytest.raises(InputRefused, match="tokenizer.json"):
        keys_of({"tokenizer.json": json.dumps(content).encode()})


# -- and back
# -------------------------------------------------------------------------------------------------------------------


def test_files_rebuilt_from_the_keys(trained: bytes) -> None:
    kv = dict(tokenizer_keys(assets_of(trained, *FILES), config_of(503)).kv)
    assets = tokenizer_assets(KeyReader(kv, "file"))
    rebuilt = spm.SentencePieceProcessor(model_proto=assets["tokenizer.model"])
    assert rebuilt.vocab_size() == 500
    assert rebuilt.encode(TEXT) == spm.SentencePieceProcessor(model_proto=trained).encode(TEXT)
    assert tokenizer_model.parse(assets["tokenizer.model"]).pieces == tokenizer_model.parse(trained).pieces
    config = json.loads(assets["tokenizer_config.json"])
    added = {token: (entry["content"], entry["special"]) for token, entry in config["added_tokens_decoder"].items()}
    assert added == {token: (entry["content"], entry["special"]) for token, entry in added_decoder().items()}
    assert config["chat_template"] == CONFIG["chat_template"] and config["additional_special_tokens"] == list(TURNS)
    assert json.loads(assets["generation_config.json"])["eos_token_id"] == [1, 7]
    json_file, truth = json.loads(assets["tokenizer.json"]), tokenizer_json(trained)
    assert json_file["model"]["vocab"] == truth["model"]["vocab"]
    assert [merge for merge in json_file["model"]["merges"] if "".join(merge) not in ADDED] == truth["model"]["merges"]
    # What was read back writes the same keys again.
    again = keys_of(dict(assets), config_of(503))
    first = keys_of(assets_of(trained, *FILES), config_of(503))
    for key in ("tokens", "scores", "token_type", "bos_token_id", "eos_token_id", "padding_token_id"):
        assert again[f"tokenizer.ggml.{key}"] == first[f"tokenizer.ggml.{key}"], key


def test_tokens_that_are_not_pieces(trained: bytes) -> None:
    """Empty, repeated and non-UTF-8 tokens keep their ids, as pieces that no text leads to."""
    kv = dict(tokenizer_keys(assets_of(trained, *FILES), config_of()).kv)
    tokens = kv["tokenizer.ggml.tokens"].value
    tokens[490:493] = ["", tokens[480], "\udcff\udc80"]
    model = tokenizer_assets(KeyReader(kv, "file"))["tokenizer.model"]
    rebuilt = spm.SentencePieceProcessor(model_proto=model)
    assert rebuilt.vocab_size() == 500 and rebuilt.is_unused(490) and rebuilt.is_unused(491) and rebuilt.is_unused(492)
    assert rebuilt.piece_to_id(tokens[480]) == 480


@pytest.mark.slow
def test_transformers_reads_the_rebuilt_files(trained: bytes, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    kv = dict(tokenizer_keys(assets_of(trained, *FILES), config_of()).kv)
    for name, data in tokenizer_assets(KeyReader(kv, "file")).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_hf()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(TEXT)["input_ids"] == [2, *spm.SentencePieceProcessor(model_proto=trained).encode(TEXT)]
    assert tokenizer("<start_of_turn>")["input_ids"] == [2, 6]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (
        2,
        1,
        0,
        3,
    )


# -- llama.cpp
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["gguf/tiny_gqa4"])
def test_tokenizer_json_as_transformers_made_it(oracles: Path, folder: str) -> None:
    pieces = tokenizer_model.parse((oracles / folder / "tokenizer.model").read_bytes()).pieces
    expected = json.loads((oracles / folder / "tokenizer.json").read_bytes())["model"]["merges"]
    user_defined = {piece.text for piece in pieces if piece.type == USER_DEFINED}
    assert [list(merge) for merge in merges(pieces) if "".join(merge) not in user_defined] == expected


@pytest.mark.parametrize("present", [FILES, FILES[1:2], FILES[:1]], ids=" ".join)
def test_llama_cpp_gives_sentencepieces_ids(llama, trained: bytes, tmp_path: Path, present: tuple[str, ...]) -> None:
    import dataclasses

    source = random_checkpoint(np.dtype(np.float32), dataclasses.replace(SMALL, vocab_size=500))
    assets = assets_of(trained, *present)
    source.assets = file_assets(assets)
    (path,) = write(GGUF().layout(source, options()), tmp_path)
    ids, _ = llama.logits(path, TEXT)
    assert ids.tolist() == [2, *spm.SentencePieceProcessor(model_proto=trained).encode(TEXT)]
    ids, _ = llama.logits(path, "<start_of_turn>")
    assert ids.tolist() == [2, 6]


def test_llama_cpp_runs_a_file_without_tokenizer(llama, tmp_path: Path) -> None:
    output = GGUF().layout(random_checkpoint(np.dtype(np.float32)), options())
    assert any("no tokenizer" in warning for warning in output.warnings)
    (path,) = write(output, tmp_path)
    _, logits = llama.logits(path, [2, 5, 9])
    assert logits.shape == (3, SMALL.vocab_size) and np.isfinite(logits).all()
