"""The tokenizer files of a checkpoint, parsed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused
from gemma2tool.formats.tokenizers import sentencepiece

MAX_JSON_BYTES = 64 << 20
MAX_ADDED = 1 << 14
"""Tokens beside the vocabulary's own; Gemma has some two hundred."""


@dataclass
class TokenizerFiles:
    """The parsed tokenizer files of a checkpoint; None where it has no such file."""

    model: sentencepiece.SentencePieceModel | None
    json: Mapping[str, Any] | None
    config: Mapping[str, Any] | None
    added: Mapping[str, Any] | None
    special_map: Mapping[str, Any] | None
    template: object = None
    """The chat template from its own file: a text, or a list of {name, template}."""

    @classmethod
    def of(cls, assets: Mapping[str, bytes]) -> TokenizerFiles:
        def parsed(name: str) -> Mapping[str, Any] | None:
            if name not in assets:
                return None
            content = strict_json.load(assets[name], what=name, max_bytes=MAX_JSON_BYTES)
            if not isinstance(content, dict):
                raise InputRefused(
                    "tokenizer.json-type", f"{name}: not a JSON object", hint="fetch the tokenizer again"
                )
            return content

        model = sentencepiece.parse(assets["tokenizer.model"]) if "tokenizer.model" in assets else None
        template: object = None
        if "chat_template.jinja" in assets:
            template = assets["chat_template.jinja"].decode("utf-8", "replace")
        elif (content := parsed("chat_template.json")) is not None:
            template = content.get("chat_template")
        files = cls(
            model,
            parsed("tokenizer.json"),
            parsed("tokenizer_config.json"),
            parsed("added_tokens.json"),
            parsed("special_tokens_map.json"),
            template,
        )
        _check_added("tokenizer.json", (files.json or {}).get("added_tokens"))
        _check_added("tokenizer_config.json", (files.config or {}).get("added_tokens_decoder"))
        _check_added("added_tokens.json", files.added)
        return files


def _check_added(name: str, added: object) -> None:
    if isinstance(added, (list, Mapping)) and len(added) > MAX_ADDED:
        raise InputRefused(
            "tokenizer.too-many-added",
            f"{name}: {len(added)} added tokens; at most {MAX_ADDED} are accepted",
            hint="fetch the tokenizer again",
        )


def added_tokens_of(
    config: Mapping[str, Any] | None, tokenizer: Mapping[str, Any] | None
) -> dict[int, tuple[str, bool]] | None:
    """Id to (text, special) of the added tokens: from tokenizer_config.json's ``added_tokens_decoder``, else tokenizer.json's list."""
    decoder = (config or {}).get("added_tokens_decoder")
    found: dict[int, tuple[str, bool]] = {}
    if isinstance(decoder, Mapping):
        for token, entry in decoder.items():
            if str(token).isdecimal() and isinstance(entry, Mapping) and isinstance(entry.get("content"), str):
                found[int(token)] = (entry["content"], bool(entry.get("special")))
        return found
    listed = (tokenizer or {}).get("added_tokens")
    if not isinstance(listed, list):
        return None
    for entry in listed:
        token, text = (entry.get("id"), entry.get("content")) if isinstance(entry, Mapping) else (None, None)
        if isinstance(token, int) and token >= 0 and isinstance(text, str):
            found[token] = (text, bool(entry.get("special")))
    return found


def tokenizer_config(
    added: Mapping[int, tuple[str, bool]], special: Mapping[str, str], *, bos: bool, eos: bool
) -> dict[str, Any]:
    """tokenizer_config.json as transformers 4 wrote Gemma's, without a chat template.

    ``added``: id to (text, special) of the added tokens; ``special``: "bos", "eos", "unk", "pad" to their texts; ``bos``, ``eos``:
    whether they are put around every text.
    """
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config: dict[str, Any] = {
        "add_bos_token": bos,
        "add_eos_token": eos,
        "added_tokens_decoder": {
            str(token): {"content": text, **flags, "special": is_special} for token, (text, is_special) in added.items()
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
    }
    for kind, text in special.items():
        config[f"{kind}_token"] = text
    turns = [text for text, is_special in added.values() if is_special and text.endswith("_of_turn>")]
    if turns:
        config["additional_special_tokens"] = turns
    return config
