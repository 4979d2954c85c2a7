"""tokenizer.json from a SentencePiece model, as transformers' own conversion makes it for Gemma: transformers needs it where the
protobuf package is not installed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from gemma2tool.formats.tokenizers.sentencepiece import NORMAL, SPACE, UNKNOWN, USER_DEFINED, Piece

MAX_MERGED = 256


def tokenizer_json(pieces: Sequence[Piece], added: Mapping[int, tuple[str, bool]], bos: int | None) -> bytes:
    """The file's bytes. ``added``: id to (text, special) of the added tokens; ``bos``: the id put before every text, if any."""
    vocab = {piece.text: token for token, piece in enumerate(pieces)}
    unknown = next((piece.text for piece in pieces if piece.type == UNKNOWN), None)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(token, *entry) for token, entry in sorted(added.items())],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None if bos is None else _post_processor(pieces[bos].text, bos),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges(pieces),
        },
    }
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")


def merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others; pieces of the best score first, as SentencePiece would merge them.

    None for pieces of more than ``MAX_MERGED`` characters, which no training makes: the ways to cut one grow with the square.
    """
    vocab = {piece.text for piece in pieces}
    made = [piece for piece in pieces if piece.type in (NORMAL, USER_DEFINED) and len(piece.text) <= MAX_MERGED]
    made.sort(key=lambda piece: -piece.score)
    return [
        (piece.text[:at], piece.text[at:])
        for piece in made
        for at in range(1, len(piece.text))
        if piece.text[:at] in vocab and piece.text[at:] in vocab
    ]


def _added(token: int, text: str, special: bool) -> dict[str, object]:
    return {
        "id": token,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _post_processor(text: str, token: int) -> dict[str, object]:
    def special(kind: int) -> dict[str, object]:
        return {"SpecialToken": {"id": text, "type_id": kind}}

    def sequence(name: str, kind: int) -> dict[str, object]:
        return {"Sequence": {"id": name, "type_id": kind}}

    return {
        "type": "TemplateProcessing",
        "single": [special(0), sequence("A", 0)],
        "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]}},
    }
