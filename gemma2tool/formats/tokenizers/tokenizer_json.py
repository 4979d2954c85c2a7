"""``tokenizer.json`` and SentencePiece's vocabulary: either from the other.

Written as transformers' own conversion writes it for Gemma: transformers needs the file where the protobuf package is
not installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from gemma2tool.containers.tokenizer_json import flat_steps, merge_pairs, model_of
from gemma2tool.containers.tokenizer_model import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    NormalizerSpec,
    Piece,
)
from gemma2tool.errors import InputRefused
from gemma2tool.formats.tokenizers.files import Object, listed_tokens
from gemma2tool.model.tokenizer import Tokenizer

MAX_MERGED = 256

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


# -- reading
# ---------------------------------------------------------------------------------------------------------------


def is_byte_fallback_bpe(tokenizer: Object) -> bool:
    model = model_of(tokenizer)
    vocab = model.get("vocab")
    return (
        isinstance(vocab, Mapping) and bool(vocab) and model.get("type") == "BPE" and bool(model.get("byte_fallback"))
    )


def json_pieces(tokenizer: Object) -> list[Piece]:
    """The SentencePiece vocabulary that a tokenizer.json was made from.

    A SentencePiece BPE score is minus the rank of the piece, -0.0 for the first normal one; ids are given out in the
    same order. Where the merges are in another order than the ids, the rank of a piece's first merge counts. Raises
    ``InputRefused`` (``tokenizer.kind``, ``tokenizer.ids``).
    """
    model = model_of(tokenizer)
    if not is_byte_fallback_bpe(tokenizer):
        raise InputRefused(
            "tokenizer.kind",
            "tokenizer.json: not a byte-fallback BPE, as Gemma's is",
            hint="put the model's tokenizer.model beside the weights",
        )
    vocab: Mapping[str, int] = model["vocab"]
    by_id = _by_id(vocab)
    added = listed_tokens(tokenizer)
    normal = [token for token in sorted(by_id) if token not in added and not _BYTE_PIECE.fullmatch(by_id[token])]
    ranks = _ranks(normal, vocab, merge_pairs(model, set()))
    pieces = []
    for token in sorted(by_id):
        text = by_id[token]
        if token in ranks:
            pieces.append(Piece(text, -float(ranks[token])))
        elif _BYTE_PIECE.fullmatch(text):
            pieces.append(Piece(text, 0.0, BYTE))
        else:
            unknown = text == model.get("unk_token")
            pieces.append(Piece(text, 0.0, UNKNOWN if unknown else USER_DEFINED))
    return pieces


def with_control_pieces(pieces: Sequence[Piece], roles: Mapping[str, int]) -> list[Piece]:
    """bos, eos and pad as control pieces, as tokenizer.model has them."""
    control = {roles.get(role) for role in ("bos", "eos", "pad")}
    return [
        piece._replace(type=CONTROL) if token in control and piece.type == USER_DEFINED else piece
        for token, piece in enumerate(pieces)
    ]


def json_normalizer(tokenizer: Object) -> NormalizerSpec:
    """The space that is put before a text (``Prepend``). The model file cannot represent any other step."""
    flat = flat_steps(tokenizer.get("normalizer"), "normalizers")
    return NormalizerSpec(add_dummy_prefix=any(step == _PREPEND for step in flat))


def _by_id(vocab: Mapping[str, int]) -> dict[int, str]:
    by_id: dict[int, str] = {}
    for text, token in vocab.items():
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < len(vocab) or token in by_id:
            raise InputRefused(
                "tokenizer.ids", f"tokenizer.json: the vocabulary's ids are not 0 to {len(vocab) - 1}, each once"
            )
        by_id[token] = text
    tab = vocab.get("<0x08>", -2) + 1
    if "<0x09>" not in vocab and by_id.get(tab) == "\t":
        by_id[tab] = "<0x09>"  # transformers' Gemma converter wrote the byte's own text
    return by_id


def _ranks(normal: Sequence[int], vocab: Mapping[str, int], merges: Iterable[tuple[Any, ...]]) -> dict[int, int]:
    """Rank of each normal piece: by id, or by its first merge where merges and ids disagree (pieces without merges come
    last).
    """
    if not normal:
        return {}
    first_merge: dict[int, int] = {}
    for rank, pair in enumerate(merges):
        token = vocab.get("".join(pair)) if all(isinstance(part, str) for part in pair) else None
        if token is not None:
            first_merge.setdefault(token, rank)
    order = [token for token in normal if token in first_merge]
    if all(first_merge[a] < first_merge[b] for a, b in pairwise(order)):
        return {token: token - normal[0] for token in normal}
    last = len(first_merge) + len(vocab)
    ranked = sorted(normal, key=lambda token: (first_merge.get(token, last), token))
    return {token: rank for rank, token in enumerate(ranked)}


# -- writing
# ---------------------------------------------------------------------------------------------------------------

_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """The file's bytes; bos is put before every text unless ``tokenizer.adds`` says otherwise."""
    pieces = _as_found(tokenizer)
    vocab = {piece.text: token for token, piece in enumerate(pieces)}
    unknown = next((piece.text for piece in pieces if piece.type == UNKNOWN), None)
    bos = tokenizer.roles.get("bos") if tokenizer.adds.get("bos", True) else None
    prefix = tokenizer.normalizer.add_dummy_prefix
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token,
                "content": added.content,
                "single_word": added.single_word,
                "lstrip": added.lstrip,
                "rstrip": added.rstrip,
                "normalized": added.normalized,
                "special": added.is_special,
            }
            for token, added in sorted(tokenizer.added_tokens.items())
        ],
        "normalizer": {"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]} if prefix else _REPLACE,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None if bos is None else _post_processor(tokenizer.pieces.texts[bos], bos),
        "decoder": {"type": "Sequence", "decoders": DECODER},
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


def _as_found(tokenizer: Tokenizer) -> list[Piece]:
    """The pieces; an added token's has the token's own text, spaces included: the tokenizers library gives a token
    whose text is not in the vocabulary an id of its own choice.
    """
    pieces = tokenizer.pieces.listed()
    known = set(tokenizer.pieces.texts)
    for token, added in tokenizer.added_tokens.items():
        if token < len(pieces) and added.content not in known:
            pieces[token] = pieces[token]._replace(text=added.content)
    return pieces


DECODER: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


def merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others; pieces of the best score first, as SentencePiece would merge them.

    None for pieces of more than ``MAX_MERGED`` characters, which no training makes: the ways to cut one grow with the
    square of its length.
    """
    vocab = {piece.text for piece in pieces}
    merged = [piece for piece in pieces if piece.type in (NORMAL, USER_DEFINED) and len(piece.text) <= MAX_MERGED]
    merged.sort(key=lambda piece: -piece.score)
    return [
        (piece.text[:at], piece.text[at:])
        for piece in merged
        for at in range(1, len(piece.text))
        if piece.text[:at] in vocab and piece.text[at:] in vocab
    ]


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
