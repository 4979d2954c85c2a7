"""The canonical tokenizer as GGUF key-values, as llama.cpp's converter writes them for Gemma 2.

With tokenizer.model, tokenizer.json and tokenizer_config.json the keys are the converter's, byte for byte. Where it
would fail or write a broken file (tokenizer.json alone, no tokenizer_config.json, an eos list in the config), they hold
what the other files state, and ``warnings`` name what no file states. A chat_template.jinja takes precedence over a
template in tokenizer_config.json, as in transformers; the converter uses the latter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from gemma2tool.containers.tokenizer_model import CONTROL, NORMAL, SPACE, UNUSED, USER_DEFINED
from gemma2tool.formats.gguf.key_values import KeyValue, boolean, floats, integers, string, strings, u32
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.tokenizer import DEFAULT_TEMPLATE, Tokenizer, looks_special

ADDED_SCORE = -1000.0
PADDING_SCORE = -10000.0
MAX_PADDING = 1024
"""Ids without a token beyond which a warning is due; frameworks pad vocabularies to multiples of 64 to 256."""

_ID_KEYS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",  # the key's own spelling
    "pad": "tokenizer.ggml.padding_token_id",
    "mask": "tokenizer.ggml.mask_token_id",
}
_ADD_KEYS = {role: f"tokenizer.ggml.add_{role}_token" for role in ("bos", "eos", "sep")}


@dataclass
class TokenizerKeys:
    """The key-values, and what the user must know about them."""

    kv: list[KeyValue] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def tokenizer_keys(tokenizer: Tokenizer, config: Gemma2Config) -> TokenizerKeys:
    """The ``tokenizer.*`` keys. Without a vocabulary: those of a file that llama.cpp loads and that takes ids only."""
    if not tokenizer.has_vocabulary:
        return _ids_alone(config)
    vocabulary = _Vocabulary(config.vocab_size)
    warnings = list(tokenizer.notes)
    warnings += vocabulary.fill(tokenizer)
    kv = [
        ("tokenizer.ggml.model", string("llama")),
        ("tokenizer.ggml.pre", string("default")),
        ("tokenizer.ggml.tokens", strings(vocabulary.tokens)),
        ("tokenizer.ggml.scores", floats(vocabulary.scores)),
        ("tokenizer.ggml.token_type", integers(vocabulary.types)),
    ]
    kv += [(_ID_KEYS[role], u32(token)) for role, token in tokenizer.roles.items() if role in _ID_KEYS]
    kv += [(_ADD_KEYS[role], boolean(tokenizer.adds[role])) for role in tokenizer.declared if role in _ADD_KEYS]
    kv += _template_keys(tokenizer.chat_templates)
    kv.append(("tokenizer.ggml.add_space_prefix", boolean(tokenizer.normalizer.add_dummy_prefix)))
    return TokenizerKeys(kv, warnings)


def _ids_alone(config: Gemma2Config) -> TokenizerKeys:
    """The config's special ids, for a program that has a vocabulary: llama.cpp ignores them where the file has none."""
    eos, *more = config.eos_token_ids or (None,)
    ids = {"bos": config.bos_token_id, "eos": eos, "eot": more[0] if more else None, "padding": config.pad_token_id}
    kv = [("gemma2.vocab_size", u32(config.vocab_size)), ("tokenizer.ggml.model", string("no_vocab"))]
    kv += [
        (f"tokenizer.ggml.{name}_token_id", u32(token))
        for name, token in ids.items()
        if token is not None and token >= 0
    ]
    warning = (
        "no tokenizer.model or tokenizer.json beside the weights: the GGUF has no tokenizer, and llama.cpp can be given"
        " token ids only"
    )
    return TokenizerKeys(kv, [warning])


class _Vocabulary:
    """Token texts, scores and types by id; ids that no tokenizer knows are [PADn]."""

    def __init__(self, size: int) -> None:
        self.tokens = [f"[PAD{token}]" for token in range(size)]
        self.scores = [PADDING_SCORE] * size
        self.types = [UNUSED] * size

    def fill(self, tokenizer: Tokenizer) -> Iterator[str]:
        """Put the tokenizer's tokens in their places; yields warnings."""
        for token, piece in enumerate(tokenizer.pieces.listed()):
            self._put(token, piece.text, piece.score, NORMAL if piece.type == USER_DEFINED else piece.type)
        for token, added in tokenizer.added_tokens.items():
            if added.special is None:
                self._put(token, added.content, ADDED_SCORE, USER_DEFINED)
            elif added.special or looks_special(added.content):
                self._put(token, added.content, ADDED_SCORE, CONTROL)
            else:
                self._put(token, added.content.replace(SPACE, " "), ADDED_SCORE, USER_DEFINED)
        size = len(self.tokens)
        if tokenizer.size > size:
            yield (
                f"the tokenizer has ids up to {tokenizer.size - 1}, the model's vocabulary ends at {size - 1}: tokens"
                " beyond it are left out"
            )
        if size - tokenizer.size > MAX_PADDING:
            yield (
                f"the tokenizer has {tokenizer.size} tokens, the model {size} embedding rows: is it another model's"
                f" tokenizer? {size - tokenizer.size} ids become [PADn]"
            )

    def _put(self, token: int, text: str, score: float, type: int) -> None:
        if token < len(self.tokens):
            self.tokens[token], self.scores[token], self.types[token] = text, score, type


def template_key(name: str) -> str:
    """A chat template's name as keys spell it."""
    return re.sub(r"[^A-Za-z0-9]", "_", name)


def _template_keys(templates: Mapping[str, str]) -> list[KeyValue]:
    keys: list[KeyValue] = []
    names: list[str] = []
    for name, template in templates.items():
        name = template_key(name)
        if name and name != DEFAULT_TEMPLATE and name not in names:
            names.append(name)
            keys.append((f"tokenizer.chat_template.{name}", string(template)))
    if names:
        keys.append(("tokenizer.chat_templates", strings(names)))
    if DEFAULT_TEMPLATE in templates:
        keys.append(("tokenizer.chat_template", string(templates[DEFAULT_TEMPLATE])))
    return keys
