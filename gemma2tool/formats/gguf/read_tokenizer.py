"""A GGUF's tokenizer keys to the canonical tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from gemma2tool.containers.tokenizer_model import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    NormalizerSpec,
    Piece,
)
from gemma2tool.errors import InputRefused
from gemma2tool.formats.gguf.key_values import KeyReader
from gemma2tool.formats.gguf.stops import all_stop_ids, implied_stops, stop_ids
from gemma2tool.formats.tokenizers.writing import derived_files
from gemma2tool.model.checkpoint import Assets
from gemma2tool.model.tokenizer import DEFAULT_TEMPLATE, AddedToken, Pieces, Tokenizer, looks_special

ROLE_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SAMPLING = {
    "top_k": ("general.sampling.top_k", KeyReader.integer),
    "top_p": ("general.sampling.top_p", KeyReader.number),
    "min_p": ("general.sampling.min_p", KeyReader.number),
    "temperature": ("general.sampling.temp", KeyReader.number),
    "repetition_penalty": ("general.sampling.penalty_repeat", KeyReader.number),
}


def tokenizer_assets(keys: KeyReader) -> Assets:
    """The canonical tokenizer and the files made from it, read when they are requested.

    There are no files if the GGUF has no vocabulary. Raises ``InputRefused`` (``gguf.tokenizer``) for a tokenizer of
    another kind than Gemma's.
    """
    if keys.texts("tokenizer.ggml.tokens", None) is None:
        return Assets({}, lambda assets, config: Tokenizer(chat_templates=_templates(keys)), derived=True)
    kind = keys.text("tokenizer.ggml.model", "llama")
    if kind != "llama":
        raise InputRefused(
            "gguf.tokenizer",
            f"{keys.where}: its tokenizer is of the kind {kind!r}, Gemma's is 'llama'",
            hint="only Gemma 2 can be read",
        )
    tokenizer = cache(lambda: read_tokenizer(keys))
    files = derived_files(tokenizer, lambda: _generation_config(keys, tokenizer()))
    return Assets(files, lambda assets, config: tokenizer(), derived=True)


def read_tokenizer(keys: KeyReader) -> Tokenizer:
    """Raises ``InputRefused`` (``gguf.tokenizer``) for lists of different lengths."""
    tokens = list(keys.texts("tokenizer.ggml.tokens"))
    count = len(tokens)
    scores = list(keys.numbers("tokenizer.ggml.scores", [0.0] * count))
    types = list(keys.numbers("tokenizer.ggml.token_type", [NORMAL] * count))
    if len(scores) != count or len(types) != count:
        raise InputRefused(
            "gguf.tokenizer",
            f"{keys.where}: {count} tokens but {len(scores)} scores and {len(types)} token types",
            hint="the file is damaged: download it again",
        )
    roles = _roles(keys, tokens)
    while count and types[count - 1] == UNUSED and tokens[count - 1] == f"[PAD{count - 1}]":
        count -= 1  # ids that the converter made up to fill the vocabulary
    listed = [Piece(*entry) for entry in zip(tokens[:count], scores, map(int, types), strict=False)]
    # llama.cpp's defaults for this kind of tokenizer are bos before a text, no eos after it, a space before it.
    adds = {
        "bos": keys.flag("tokenizer.ggml.add_bos_token", True),
        "eos": keys.flag("tokenizer.ggml.add_eos_token", False),
    }
    return Tokenizer(
        Pieces.of(_pieces(listed, roles)),
        _added_tokens(listed, roles),
        {role: token for role, token in roles.items() if token < count},
        adds,
        tuple(role for role in adds if f"tokenizer.ggml.add_{role}_token" in keys.kv),
        NormalizerSpec(add_dummy_prefix=keys.flag("tokenizer.ggml.add_space_prefix", True)),
        all_stop_ids(keys),
        _templates(keys),
        implied_stops=implied_stops(keys),
    )


def _roles(keys: KeyReader, tokens: list[str]) -> dict[str, int]:
    roles: dict[str, int] = {}
    for role, name in ROLE_KEYS.items():
        token = keys.integer(f"tokenizer.ggml.{name}_token_id", None)
        if token is None and f"<{role}>" in tokens:
            token = tokens.index(f"<{role}>")
        if token is not None and 0 <= token < len(tokens):
            roles[role] = token
    return roles


def _pieces(tokens: list[Piece], roles: Mapping[str, int]) -> list[Piece]:
    """SentencePiece's vocabulary. It accepts no empty, repeated or non-UTF-8 pieces, and no text produces them."""
    pieces = []
    seen: set[str] = set()
    for token, (text, score, type) in enumerate(tokens):
        if token == roles.get("unk"):
            type = UNKNOWN
        elif type == CONTROL and token not in roles.values():
            type = USER_DEFINED  # SentencePiece must find it in a text, as in Gemma's own model file
        elif type not in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE):
            type = NORMAL
        if type == USER_DEFINED:
            text = text.replace(" ", SPACE)
        if not text or text in seen or not _is_utf8(text):
            text, type = f"[PAD{token}]", UNUSED
        seen.add(text)
        pieces.append(Piece(text, score if type == NORMAL else 0.0, type))
    return pieces


def _added_tokens(tokens: list[Piece], roles: Mapping[str, int]) -> dict[int, AddedToken]:
    """The tokens that are found in a text before it is cut into pieces.

    A control token is special; for those that the converter makes control tokens because of their text alone, the
    source's flag is unknown.
    """
    added = {}
    for token, piece in enumerate(tokens):
        if piece.type == CONTROL:
            known = token in roles.values() or not looks_special(piece.text)
            added[token] = AddedToken(piece.text, special=True if known else None)
        elif piece.type == USER_DEFINED:
            # Gemma's own files write runs of spaces as U+2581; other tokens have the spaces that are in the text.
            spaces_only = not piece.text.strip(" ")
            added[token] = AddedToken(piece.text.replace(" ", SPACE) if spaces_only else piece.text)
    return added


def _templates(keys: KeyReader) -> dict[str, str]:
    default = keys.text("tokenizer.chat_template", None)
    templates = {} if default is None else {DEFAULT_TEMPLATE: default}
    for name in keys.texts("tokenizer.chat_templates", ()):
        templates[name] = keys.text(f"tokenizer.chat_template.{name}", "")
    return templates


def _generation_config(keys: KeyReader, tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids and sampling."""
    config: dict[str, Any] = {
        f"{role}_token_id": tokenizer.roles[role] for role in ("bos", "eos", "pad") if role in tokenizer.roles
    }
    stops = stop_ids(keys)
    if len(stops) > 1:
        config["eos_token_id"] = list(stops)
    for name, (key, read) in _SAMPLING.items():
        value = read(keys, key, None)
        if value is not None:
            config[name] = value
    return config


def _is_utf8(text: str) -> bool:
    """Whether a token is UTF-8: bytes that are not were kept as surrogates."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)
