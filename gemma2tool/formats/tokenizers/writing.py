"""The canonical tokenizer as the files that Hugging Face repositories carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gemma2tool.containers import strict_json, tokenizer_model
from gemma2tool.containers.tokenizer_model import SPACE, UNUSED, USER_DEFINED, Piece
from gemma2tool.errors import InputRefused
from gemma2tool.formats.assets import dump_json
from gemma2tool.formats.tokenizers.agreement import find_conflicts
from gemma2tool.formats.tokenizers.files import MAX_JSON_BYTES
from gemma2tool.formats.tokenizers.tokenizer_json import tokenizer_json
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.tokenizer import DEFAULT_TEMPLATE, Pieces, Tokenizer

_CONFIG_ROLES = ("bos", "eos", "unk", "pad")


def derived_files(
    tokenizer: Callable[[], Tokenizer], generation: Callable[[], Mapping[str, Any]]
) -> dict[str, Callable[[], bytes]]:
    """File name -> what makes its bytes. ``generation``: the contents of generation_config.json."""
    return {
        "tokenizer.model": lambda: tokenizer_model_file(tokenizer()),
        "tokenizer.json": lambda: tokenizer_json(tokenizer()),
        "tokenizer_config.json": lambda: dump_json(tokenizer_config(tokenizer())),
        "generation_config.json": lambda: dump_json(generation()),
    }


def tokenizer_model_file(tokenizer: Tokenizer) -> bytes:
    size = len(tokenizer.pieces)  # an added token, such as [PAD], has no piece
    special = {role: token for role in _CONFIG_ROLES if (token := tokenizer.roles.get(role, -1)) < size}
    return tokenizer_model.encode(tokenizer.pieces.listed(), special, tokenizer.normalizer)


def model_with_added_tokens(model: bytes, tokenizer: Tokenizer) -> bytes | None:
    """A sentencepiece model with the tokens that only other files add; None where it has all of them.

    They become USER_DEFINED pieces: SentencePiece finds those in a text before it splits the rest, as transformers
    finds added tokens. Raises ``InputRefused`` for a damaged model.
    """
    pieces = list(tokenizer_model.parse(model).pieces)
    texts = {token: added.content.replace(" ", SPACE) for token, added in tokenizer.added_tokens.items()}
    missing = {token: text for token, text in texts.items() if token >= len(pieces) or pieces[token].text != text}
    if not missing:
        return None
    pieces += [Piece(f"<unused_id_{token}>", 0.0, UNUSED) for token in range(len(pieces), max(missing) + 1)]
    for token, text in missing.items():
        pieces[token] = Piece(text, 0.0, USER_DEFINED)
    return tokenizer_model_file(replace(tokenizer, pieces=Pieces.of(pieces)))


@dataclass(frozen=True)
class SentencePieceFile:
    """The only tokenizer of a format whose programs read SentencePiece's models alone.

    ``data``: the file; None where the source has no tokenizer, or none that such a model can be, which ``lost`` says.
    ``tokenizer``: the canonical one that it is made of; None where it is the source's own file as it is.
    """

    data: bytes | None
    tokenizer: Tokenizer | None = None
    lost: str = ""


def sentencepiece_file(checkpoint: Checkpoint) -> SentencePieceFile:
    """The source's tokenizer.model, with the tokens that only other files add; made from tokenizer.json where there is
    no other, unless texts would get other ids.
    """
    model = checkpoint.assets.get("tokenizer.model")
    try:
        tokenizer = checkpoint.tokenizer.within(checkpoint.config.vocab_size)
        if model is not None:
            more = model_with_added_tokens(model, tokenizer)
            return SentencePieceFile(model) if more is None else SentencePieceFile(more, tokenizer)
        if not tokenizer.has_vocabulary:
            return SentencePieceFile(None, lost="the source has no tokenizer")
        reason = _cannot_be_pieces(checkpoint, tokenizer)
        if reason:
            return SentencePieceFile(
                None, lost=f"tokenizer.json, the source's only tokenizer, is left behind: {reason}"
            )
        model = tokenizer_model_file(tokenizer)
        return SentencePieceFile(model_with_added_tokens(model, tokenizer) or model, tokenizer)
    except InputRefused as error:  # of a model, a verification says why
        lost = "" if model is not None else f"the source's tokenizer is left behind: {error.message}"
        return SentencePieceFile(model, lost=lost)


def _cannot_be_pieces(checkpoint: Checkpoint, tokenizer: Tokenizer) -> str:
    """Why a model made of the pieces of tokenizer.json would give texts other ids; empty where it would not."""
    data = checkpoint.assets.get("tokenizer.json", b"")
    content = strict_json.load(data, what="tokenizer.json", max_bytes=MAX_JSON_BYTES)
    conflicts = find_conflicts(content, tokenizer.pieces.listed(), tokenizer.added_tokens)
    return next((conflict.message for conflict in conflicts if conflict.serious), "")


def tokenizer_config(tokenizer: Tokenizer, *, chat_template: bool = True) -> dict[str, Any]:
    """tokenizer_config.json as transformers 4 wrote Gemma's. ``chat_template``: with the templates, if
    there are any.
    """
    added = tokenizer.added_tokens
    config: dict[str, Any] = {
        "add_bos_token": tokenizer.adds.get("bos", True),
        "add_eos_token": tokenizer.adds.get("eos", False),
        "added_tokens_decoder": {
            str(token): {
                "content": entry.content,
                "lstrip": entry.lstrip,
                "normalized": entry.normalized,
                "rstrip": entry.rstrip,
                "single_word": entry.single_word,
                "special": entry.is_special,
            }
            for token, entry in added.items()
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
    }
    for role in _CONFIG_ROLES:
        if role in tokenizer.roles:
            token = tokenizer.roles[role]
            config[f"{role}_token"] = added[token].content if token in added else tokenizer.pieces.texts[token]
    turns = [entry.content for entry in added.values() if entry.is_special and entry.content.endswith("_of_turn>")]
    if turns:
        config["additional_special_tokens"] = turns
    template = _template(tokenizer.chat_templates)
    if chat_template and template is not None:
        config["chat_template"] = template
    return config


def _template(templates: Mapping[str, str]) -> str | list[dict[str, str]] | None:
    if not templates.keys() - {DEFAULT_TEMPLATE}:
        return templates.get(DEFAULT_TEMPLATE)
    names = [name for name in (DEFAULT_TEMPLATE, *templates) if name in templates]
    return [{"name": name, "template": templates[name]} for name in dict.fromkeys(names)]
