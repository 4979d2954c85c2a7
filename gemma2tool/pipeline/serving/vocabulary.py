"""From the texts of tokens, by which some servers name them, to their ids."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from gemma2tool.containers.tokenizer_model import BYTE, NORMAL, SPACE
from gemma2tool.engines.servers.answers import Choice
from gemma2tool.model.tokenizer import Tokenizer


class Vocabulary:
    """The tokens of ``tokenizer``, of a model with ``size`` rows."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size

    def id_of(self, choice: Choice) -> int | None:
        """None for an id outside the vocabulary, and for a text that is that of no token or of several."""
        if choice.token is not None:
            return choice.token if choice.token < self.size else None
        return None if choice.text is None else self._by_text.get(choice.text)

    def text(self, token: int) -> bytes:
        """What a token adds to a text."""
        pieces = self.tokenizer.pieces
        if token not in self.tokenizer.added_tokens and token < len(pieces) and pieces.types[token] == BYTE:
            return bytes([int(pieces.texts[token][1:-1], 16)])
        spelling = self.tokenizer.spelling(token) or ""
        return spelling.replace(SPACE, " ").encode("utf-8", "replace")

    @cached_property
    def _by_text(self) -> Mapping[bytes, int]:
        by_text: dict[bytes, int | None] = {}
        types = self.tokenizer.pieces.types
        # Pieces win over bytes, which stand for what no piece has.
        ids = sorted(range(min(self.tokenizer.size, self.size)), key=lambda i: i < len(types) and types[i] != NORMAL)
        plain = {i for i in ids if i < len(types) and types[i] == NORMAL}
        for token in ids:
            text = self.text(token)
            if text in by_text and not (by_text[text] in plain and token not in plain):
                by_text[text] = None
            elif text not in by_text:
                by_text[text] = token
        return {text: token for text, token in by_text.items() if token is not None and text}
