"""A canonical tokenizer, run: text to token ids and back, by the sentencepiece library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from gemma2tool.containers import tokenizer_model
from gemma2tool.containers.tokenizer_model import BYTE, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Piece
from gemma2tool.errors import InputRefused
from gemma2tool.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_PLACEHOLDER = "\ufdd0"
"""Begins the texts of pieces that no text leads to; a code point that is not a character."""


class TokenizerRunner:
    """Encodes and decodes with a ``Tokenizer``, added tokens found wherever they stand in a text.

    bos and eos are not put around a text. Raises ``InputRefused`` (``tokenizer.damaged``) for a vocabulary that
    sentencepiece cannot load.
    """

    def __init__(self, tokenizer: Tokenizer, where: str = "the tokenizer") -> None:
        from sentencepiece import SentencePieceProcessor

        model = serialized(tokenizer)
        try:
            tokenizer_model.check(model, where)
            self._model: SentencePieceProcessor = SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError):
            raise InputRefused(
                "tokenizer.damaged",
                f"{where}: sentencepiece cannot load its vocabulary",
                hint="download the tokenizer again",
            ) from None
        self._size = tokenizer.size
        self._silent = {tokenizer.roles.get(role) for role in ("bos", "eos", "pad")}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; bos, eos, pad and ids beyond the vocabulary have none."""
        spoken = [int(token) for token in ids if 0 <= token < self._size and token not in self._silent]
        text: str = self._model.decode(spoken)
        return text


def serialized(tokenizer: Tokenizer) -> bytes:
    """The tokenizer as a model file for ``TokenizerRunner``; equal bytes encode and decode alike."""
    vocabulary = tokenizer.vocabulary
    types = vocabulary.types.tolist()
    unknown = _unknown_id(tokenizer, types)
    byte_fallback = types.count(BYTE) == 256
    taken = {text for text, type in zip(vocabulary.texts, types, strict=True) if type == USER_DEFINED}

    def pieces() -> Iterator[Piece]:
        seen: set[str] = set()
        for token, (text, score) in enumerate(zip(vocabulary.texts, vocabulary.scores.tolist(), strict=True)):
            type = types[token]
            if token == unknown:
                type = UNKNOWN
            elif type == UNKNOWN or (type == BYTE and not byte_fallback):
                type = NORMAL
            shadowed = type not in (USER_DEFINED, UNKNOWN) and text in taken
            if not text or text in seen or shadowed or _has_surrogates(text):
                # SentencePiece takes no empty, repeated or non-UTF-8 pieces.
                text, type = f"{_PLACEHOLDER}{token}", (UNKNOWN if type == UNKNOWN else UNUSED)
            seen.add(text)
            yield Piece(text, score, type)
        if unknown is None:
            yield Piece(_PLACEHOLDER, 0.0, UNKNOWN)

    special = {"unk": len(types) if unknown is None else unknown}
    return tokenizer_model.encode(pieces(), special, tokenizer.normalizer, byte_fallback=byte_fallback)


def _unknown_id(tokenizer: Tokenizer, types: list[int]) -> int | None:
    """The id of the unknown token; SentencePiece needs exactly one."""
    token = tokenizer.roles.get("unk")
    if token is not None and token < len(types):
        return token
    places = np.flatnonzero(tokenizer.pieces.types == UNKNOWN)
    return int(places[0]) if len(places) else None


def _has_surrogates(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text)
