"""An untrusted tokenizer.model: checked before the library sees it, and before much memory is used."""

from __future__ import annotations

import json
import time

import pytest

from gemma2tool.containers import tokenizer_model
from gemma2tool.containers.tokenizer_model import Piece
from gemma2tool.formats.tokenizers.files import MAX_ADDED, TokenizerFiles
from gemma2tool.formats.tokenizers.tokenizer_json import MAX_MERGED, merges
from tests.fuzz.seeds import PIECES, model
from tests.support.hostile.refusal import assert_refused
from tests.support.paths import TINY


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 20,
        b"\x0a\x05ab",
        b"\x0b",
        b"\x0a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
        b"\x0a\0" * 5_000_000,
        b"\x0a\x03\x0a\x01\xff",
        b"\x0a\xf4\x03\x0a\xf0\x03" + b"a" * 3,
        b"\x0a" + bytes([0x80, 0x80, 0x08]) + b"\x0a" + bytes(1 << 17),
        b"\n" + bytes(65 << 20),
    ],
    ids=[
        "no message",
        "a cut piece",
        "a group",
        "a number that does not end",
        "five million pieces",
        "not UTF-8",
        "lies inside",
        "128 KiB piece",
        "65 MiB",
    ],
)
def test_refused_before_the_library(data: bytes) -> None:
    assert_refused(lambda: tokenizer_model.check(data), "sentencepiece.damaged")


def test_valid_models_pass() -> None:
    tokenizer_model.check(model())
    assert tokenizer_model.parse(model()).pieces == PIECES


@pytest.mark.parametrize("names", [{}, {"bos_piece": "<eos>", "eos_piece": "<bos>"}, {"bos_piece": "a piece it lacks"}])
def test_special_ids_are_those_of_the_library(names: dict[str, str]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString((TINY / "tokenizer.model").read_bytes())
    for field, piece in names.items():
        setattr(proto.trainer_spec, field, piece)
    data = proto.SerializeToString()
    library = sentencepiece.SentencePieceProcessor(model_proto=data)
    expected = {role: getattr(library, f"{role}_id")() for role in ("unk", "bos", "eos", "pad")}
    assert tokenizer_model.parse(data).special_ids() == expected


def test_long_pieces_do_not_take_quadratic_time() -> None:
    """The vocabulary of a GGUF file takes this path too, with tokens of any length."""
    began = time.process_time()
    long = [
        Piece("ab" * 100_000),
        Piece("a" * (MAX_MERGED + 1)),
        Piece("a" * MAX_MERGED),
        Piece("a" * (MAX_MERGED - 1)),
        Piece("a"),
    ]
    assert merges(long) == [("a" * (MAX_MERGED - 1), "a"), ("a", "a" * (MAX_MERGED - 1))][::-1]
    assert time.process_time() - began < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "field", "added"),
    [
        ("tokenizer.json", "added_tokens", [{"id": id, "content": str(id)} for id in range(MAX_ADDED + 1)]),
        (
            "tokenizer_config.json",
            "added_tokens_decoder",
            {str(id): {"content": str(id)} for id in range(MAX_ADDED + 1)},
        ),
        ("added_tokens.json", None, {str(id): id for id in range(MAX_ADDED + 1)}),
    ],
)
def test_added_tokens_are_limited(name: str, field: str | None, added: list | dict) -> None:
    def files(added: list | dict) -> TokenizerFiles:
        return TokenizerFiles.of({name: json.dumps(added if field is None else {field: added}).encode()})

    assert_refused(lambda: files(added), "tokenizer.too-many-added")
    files(added[1:] if isinstance(added, list) else dict(list(added.items())[1:]))
