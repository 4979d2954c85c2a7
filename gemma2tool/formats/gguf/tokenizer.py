"""A GGUF's tokenizer as the files Hugging Face repositories carry: tokenizer.model, tokenizer.json and their configs."""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any

from gemma2tool.errors import InputRefused
from gemma2tool.formats.assets import dump_json
from gemma2tool.formats.gguf.config import stop_ids
from gemma2tool.formats.gguf.key_values import Reading
from gemma2tool.formats.gguf.vocab import looks_special
from gemma2tool.formats.tokenizers import sentencepiece
from gemma2tool.formats.tokenizers.files import tokenizer_config
from gemma2tool.formats.tokenizers.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
)
from gemma2tool.formats.tokenizers.tokenizer_json import tokenizer_json
from gemma2tool.model.checkpoint import Assets

SPECIAL_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SAMPLING = {
    "top_k": ("general.sampling.top_k", Reading.integer),
    "top_p": ("general.sampling.top_p", Reading.number),
    "min_p": ("general.sampling.min_p", Reading.number),
    "temperature": ("general.sampling.temp", Reading.number),
    "repetition_penalty": ("general.sampling.penalty_repeat", Reading.number),
}


def tokenizer_assets(keys: Reading) -> Assets:
    """The asset files that the key-values tell, built when they are asked for; none where the file has no tokenizer.

    Raises ``InputRefused`` for a tokenizer of another kind than Gemma's, or lists of different lengths.
    """
    tokens = keys.texts("tokenizer.ggml.tokens", None)
    if tokens is None:
        return Assets()
    kind = keys.text("tokenizer.ggml.model", "llama")
    if kind != "llama":
        raise InputRefused(
            "gguf.tokenizer",
            f"{keys.where}: its tokenizer is of the kind {kind!r}, Gemma's is 'llama'",
            hint="is it a Gemma 2?",
        )
    tokenizer = cache(lambda: _Tokenizer(keys))
    return Assets(
        {
            "tokenizer.model": lambda: tokenizer().model(),
            "tokenizer.json": lambda: tokenizer().json(),
            "tokenizer_config.json": lambda: dump_json(tokenizer().config()),
            "generation_config.json": lambda: dump_json(tokenizer().generation_config()),
        }
    )


class _Tokenizer:
    def __init__(self, keys: Reading) -> None:
        self.keys = keys
        self.tokens = list(keys.texts("tokenizer.ggml.tokens"))
        count = len(self.tokens)
        self.scores = list(keys.numbers("tokenizer.ggml.scores", [0.0] * count))
        self.types = list(keys.numbers("tokenizer.ggml.token_type", [NORMAL] * count))
        if len(self.scores) != count or len(self.types) != count:
            raise InputRefused(
                "gguf.tokenizer",
                f"{keys.where}: {count} tokens but {len(self.scores)} scores and {len(self.types)} token types",
                hint="the file is damaged; fetch it again",
            )
        self.special: dict[str, int] = {}
        for kind, name in SPECIAL_KEYS.items():
            token = keys.integer(f"tokenizer.ggml.{name}_token_id", None)
            if token is None and f"<{kind}>" in self.tokens:
                token = self.tokens.index(f"<{kind}>")
            if token is not None and 0 <= token < count:
                self.special[kind] = token
        while count and self.types[count - 1] == UNUSED and self.tokens[count - 1] == f"[PAD{count - 1}]":
            count -= 1  # ids that the converter made up to fill the vocabulary
        self.count = count

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """SentencePiece's vocabulary. It takes no empty, repeated or non-UTF-8 pieces; no text leads to those either."""
        pieces = []
        seen: set[str] = set()
        for token in range(self.count):
            text, score, kind = self.tokens[token], self.scores[token], self.types[token]
            if token == self.special.get("unk"):
                kind = UNKNOWN
            elif kind == CONTROL and token not in self.special.values():
                kind = USER_DEFINED  # SentencePiece must find them in a text, as Gemma's own model file lets it
            elif kind not in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE):
                kind = NORMAL
            if kind == USER_DEFINED:
                text = text.replace(" ", SPACE)
            if not text or text in seen or not _is_text(text):
                text, kind = f"[PAD{token}]", UNUSED
            seen.add(text)
            pieces.append(Piece(text, score if kind == NORMAL else 0.0, kind))
        return tuple(pieces)

    @cached_property
    def added(self) -> dict[int, tuple[str, bool]]:
        """Id to (text, special) of the tokens that are found in a text before it is cut into pieces."""
        found = {}
        for token in range(self.count):
            kind, text = self.types[token], self.tokens[token]
            if kind == CONTROL:
                found[token] = (text, token in self.special.values() or not looks_special(text))
            elif kind == USER_DEFINED:
                found[token] = (text.replace(" ", SPACE), False)
        return found

    def model(self) -> bytes:
        return sentencepiece.gemma_model(self.pieces, self.special)

    def json(self) -> bytes:
        return tokenizer_json(self.pieces, self.added, self.special.get("bos") if self._adds("bos", True) else None)

    def config(self) -> dict[str, Any]:
        """tokenizer_config.json, as transformers 4 wrote Gemma's."""
        special = {kind: self.tokens[token] for kind, token in self.special.items()}
        config = tokenizer_config(self.added, special, bos=self._adds("bos", True), eos=self._adds("eos", False))
        template = self._template()
        if template is not None:
            config["chat_template"] = template
        return config

    def _adds(self, kind: str, default: bool) -> bool:
        return self.keys.flag(f"tokenizer.ggml.add_{kind}_token", default)

    def _template(self) -> str | list[dict[str, str]] | None:
        default = self.keys.text("tokenizer.chat_template", None)
        names = self.keys.texts("tokenizer.chat_templates", ())
        if not names:
            return default
        choices = [{"name": "default", "template": default}] if default is not None else []
        for name in names:
            choices.append({"name": name, "template": self.keys.text(f"tokenizer.chat_template.{name}", "")})
        return choices

    def generation_config(self) -> dict[str, Any]:
        """Ids and sampling."""
        config: dict[str, Any] = {}
        for kind in ("bos", "eos", "pad"):
            if kind in self.special:
                config[f"{kind}_token_id"] = self.special[kind]
        stops = stop_ids(self.keys)
        if isinstance(stops, tuple):
            config["eos_token_id"] = list(stops)
        for name, (key, read) in _SAMPLING.items():
            value = read(self.keys, key, None)
            if value is not None:
                config[name] = value
        return config


def _is_text(text: str) -> bool:
    """Whether a token is UTF-8 (its bytes that are not were kept as surrogates)."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)
