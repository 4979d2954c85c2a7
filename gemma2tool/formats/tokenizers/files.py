"""The tokenizer files of a Hugging Face repository, parsed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma2tool.containers import strict_json, tokenizer_model
from gemma2tool.containers.tokenizer_json import added_entries
from gemma2tool.errors import InputRefused
from gemma2tool.model.tokenizer import DEFAULT_TEMPLATE, AddedToken

Object = Mapping[str, Any]
"""A parsed JSON object."""

MAX_JSON_BYTES = 64 << 20
MAX_ADDED = 1 << 14
"""Tokens beside the vocabulary's own; Gemma has about two hundred."""
MAX_TOKEN_DIGITS = 9

_NAMED_TEMPLATE = re.compile(r"additional_chat_templates/(.+)\.jinja")


@dataclass(frozen=True)
class TokenizerFiles:
    """The parsed tokenizer files of a checkpoint; None where it has no such file.

    ``templates``: chat templates from .jinja files, by name. ``other_template``: that of chat_template.json.
    """

    model: tokenizer_model.SentencePieceModel | None
    json: Object | None
    config: Object | None
    added: Object | None
    special_map: Object | None
    generation: Object | None
    templates: Mapping[str, str]
    other_template: object

    @classmethod
    def of(cls, assets: Mapping[str, bytes]) -> TokenizerFiles:
        """Raises ``InputRefused`` for a file that is damaged, or larger than any tokenizer's."""
        model = tokenizer_model.parse(assets["tokenizer.model"]) if "tokenizer.model" in assets else None
        files = cls(
            model,
            _parsed(assets, "tokenizer.json"),
            _parsed(assets, "tokenizer_config.json"),
            _parsed(assets, "added_tokens.json"),
            _parsed(assets, "special_tokens_map.json"),
            _parsed(assets, "generation_config.json"),
            _template_files(assets),
            (_parsed(assets, "chat_template.json") or {}).get("chat_template"),
        )
        _check_added("tokenizer.json", (files.json or {}).get("added_tokens"))
        _check_added("tokenizer_config.json", (files.config or {}).get("added_tokens_decoder"))
        _check_added("added_tokens.json", files.added)
        return files

    @property
    def adds_nothing(self) -> bool:
        """Whether no file lists added tokens: tokenizer.model alone tells which tokens are special."""
        decoder = (self.config or {}).get("added_tokens_decoder")
        listed = (self.json or {}).get("added_tokens")
        return not isinstance(decoder, Mapping) and not isinstance(listed, list)

    def added_tokens(self) -> dict[int, AddedToken]:
        """From tokenizer_config.json's ``added_tokens_decoder``, else tokenizer.json's list; and those that only
        added_tokens.json names, whose flags no file states.
        """
        tokens: dict[int, AddedToken] = {}
        for text, token in (self.added or {}).items():
            if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 10**MAX_TOKEN_DIGITS:
                tokens[token] = AddedToken(text, special=None, normalized=True)
        decoder = (self.config or {}).get("added_tokens_decoder")
        if not isinstance(decoder, Mapping):
            return tokens | listed_tokens(self.json or {})
        for key, entry in decoder.items():
            if _is_token_id(key) and isinstance(entry, Mapping) and isinstance(entry.get("content"), str):
                special = bool(entry.get("special"))
                tokens[int(key)] = AddedToken(
                    entry["content"],
                    special,
                    bool(entry.get("normalized", not special)),
                    bool(entry.get("lstrip")),
                    bool(entry.get("rstrip")),
                    bool(entry.get("single_word")),
                )
        return tokens

    def chat_templates(self) -> dict[str, str]:
        """By name; separate files take precedence over tokenizer_config.json, as in transformers."""
        if self.templates:
            return dict(self.templates)
        template = (self.config or {}).get("chat_template")
        return templates_of(self.other_template if template is None else template)

    def stop_ids(self) -> tuple[int, ...] | None:
        """``eos_token_id`` of generation_config.json; None where it states none."""
        stops = (self.generation or {}).get("eos_token_id")
        listed = stops if isinstance(stops, list) else [stops]
        ids = [stop for stop in listed if isinstance(stop, int) and not isinstance(stop, bool)]
        return tuple(ids) if ids and len(ids) == len(listed) else None


def templates_of(template: object) -> dict[str, str]:
    """``chat_template`` of tokenizer_config.json: a text, a list of {name, template}, or a mapping of names to them."""
    if isinstance(template, str):
        return {DEFAULT_TEMPLATE: template}
    if isinstance(template, Mapping):
        return {name: text for name, text in template.items() if isinstance(name, str) and isinstance(text, str)}
    templates: dict[str, str] = {}
    for choice in template if isinstance(template, list) else ():
        if not isinstance(choice, Mapping):
            continue
        name, text = choice.get("name"), choice.get("template")
        if isinstance(name, str) and isinstance(text, str):
            templates.setdefault(name, text)
    return templates


def listed_tokens(tokenizer: Object) -> dict[int, AddedToken]:
    """The added tokens that tokenizer.json lists."""
    return {
        token: AddedToken(entry.content, **entry.flags)
        for token, entry in added_entries(tokenizer).items()
        if 0 <= token < 10**MAX_TOKEN_DIGITS and isinstance(entry.content, str)
    }


def _is_token_id(key: object) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= MAX_TOKEN_DIGITS


def _parsed(assets: Mapping[str, bytes], name: str) -> Object | None:
    if name not in assets:
        return None
    content = strict_json.load(assets[name], what=name, max_bytes=MAX_JSON_BYTES)
    if not isinstance(content, dict):
        raise InputRefused("tokenizer.json-type", f"{name}: not a JSON object", hint="download the tokenizer again")
    return content


def _template_files(assets: Mapping[str, bytes]) -> dict[str, str]:
    templates = {}
    for name in assets:
        named = _NAMED_TEMPLATE.fullmatch(name)
        if named or name == "chat_template.jinja":
            templates[named[1] if named else DEFAULT_TEMPLATE] = assets[name].decode("utf-8", "replace")
    return templates


def _check_added(name: str, added: object) -> None:
    if isinstance(added, (list, Mapping)) and len(added) > MAX_ADDED:
        raise InputRefused(
            "tokenizer.too-many-added",
            f"{name}: {len(added)} added tokens; at most {MAX_ADDED} are accepted",
            hint="download the tokenizer again",
        )
