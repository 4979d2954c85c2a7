"""A canonical tokenizer, run: text to token ids and back, by the sentencepiece library."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from gemma2tool.containers import tokenizer_model
from gemma2tool.errors import InputRefused
from gemma2tool.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


class TokenizerRunner:
    """Encodes and decodes with a ``Tokenizer``, added tokens found wherever they stand in a text.

    bos and eos are not put around a text. Raises ``InputRefused`` (``tokenizer.damaged``) for a vocabulary that
    sentencepiece cannot load.
    """

    def __init__(self, tokenizer: Tokenizer, where: str = "the tokenizer") -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            tokenizer_model.check(tokenizer.model_file, where)
            self._model: SentencePieceProcessor = SentencePieceProcessor(model_proto=tokenizer.model_file)
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
