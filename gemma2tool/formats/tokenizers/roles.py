"""Which ids are bos, eos, unk and pad, and whether a text gets them: the rules of llama.cpp's converter, with its gaps
filled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma2tool.containers.tokenizer_json import objects
from gemma2tool.formats.tokenizers.files import Object, TokenizerFiles, listed_tokens
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.tokenizer import ROLES

GEMMA_TOKENS = {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"}


@dataclass
class Roles:
    """``ids`` by role; ``adds``: whether a text gets the token, for the roles that the files state, in their order."""

    ids: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def set(self, role: str, token: int, size: int) -> None:
        """Give the role an id unless it has one."""
        if 0 <= token < size:
            self.ids.setdefault(role, token)


def read_roles(files: TokenizerFiles, texts: Sequence[str], config: Gemma2Config) -> Roles:
    """``texts``: the vocabulary's texts by id, added tokens in their places, up to the config's vocab_size."""
    roles = Roles()
    named = _named_texts(files.config)
    if files.config is None:
        named = GEMMA_TOKENS | _named_texts(files.special_map)
    if files.json is not None:
        roles.adds = _template_adds(files.json, named)
    for role in ROLES:
        add = (files.config or {}).get(f"add_{role}_token")
        if isinstance(add, bool):
            roles.adds[role] = add
    size = config.vocab_size
    listed = {added.content: token for token, added in listed_tokens(files.json or {}).items()}
    places = {text: token for token, text in reversed(list(enumerate(texts))) if text}
    _put_first(roles, files, listed, named, size)
    for role in ROLES:
        if named.get(role) in listed:
            roles.set(role, listed[named[role]], size)
    if files.config is not None:
        for role in ("bos", "eos"):
            if named.get(role) in places:
                roles.set(role, places[named[role]], size)
    for role, id in (("bos", config.bos_token_id), ("eos", config.eos_token_id), ("pad", config.pad_token_id)):
        if isinstance(id, int):
            roles.set(role, id, size)
    _fill_gaps(roles, files, named, places, config)
    return roles


def _put_first(
    roles: Roles, files: TokenizerFiles, listed: Mapping[str, int], named: Mapping[str, str], size: int
) -> None:
    """Where tokenizer.json puts another special token before a text than the one called bos: that one is bos.

    trl's setup_chat_format calls <|im_start|> bos, and transformers 5 still puts <bos>. llama.cpp's converter would
    write that nothing is put.
    """
    texts = _first_texts(files.json or {})
    token = listed.get(texts[0]) if len(texts) == 1 else None
    if roles.adds.get("bos") is False and token is not None and (files.config or {}).get("add_bos_token") is not False:
        roles.set("bos", token, size)
        roles.adds["bos"] = True
        roles.notes.append(
            f"tokenizer.json puts {texts[0]!r} before a text, tokenizer_config.json calls {named.get('bos')!r} bos: the"
            " former is put"
        )


def _first_texts(tokenizer: Object) -> list[str]:
    """The special token before a text, by each of the post-processor's templates that has one."""
    singles = [_items(template.get("single")) for template in _templates(tokenizer)]
    return [single[0][0] for single in singles if len(single) > 1 and single[0][0]]


def _fill_gaps(
    roles: Roles, files: TokenizerFiles, named: Mapping[str, str], places: Mapping[str, int], config: Gemma2Config
) -> None:
    """Fills in what the files state and the converter omits: llama.cpp would use its own defaults, not Gemma's."""
    needed = ("bos", "eos") if files.config is not None else ("bos", "eos", "unk", "pad")
    for role in needed:
        text = named.get(role, GEMMA_TOKENS[role])
        if text in places:
            roles.set(role, places[text], config.vocab_size)
    for token in config.eos_token_ids:
        roles.set("eos", token, config.vocab_size)
    missing = [role for role in needed if role not in roles.ids]
    if missing:
        roles.notes.append(f"the tokenizer's files do not state the id of {', '.join(missing)}")
    if files.config is None and "bos" not in roles.adds:
        roles.adds = {"bos": files.json is None, **roles.adds}  # a tokenizer.json that puts no bos has none put
    if files.config is None and "eos" not in roles.adds:
        roles.adds["eos"] = False


def _named_texts(source: Object | None) -> dict[str, str]:
    """The special tokens' texts by role; an entry is a text or an object with its ``content``."""
    texts = {}
    for role in ROLES:
        entry = (source or {}).get(f"{role}_token")
        text = entry.get("content") if isinstance(entry, Mapping) else entry
        if isinstance(text, str):
            texts[role] = text
    return texts


def _template_adds(tokenizer: Object, named: Mapping[str, str]) -> dict[str, bool]:
    """What the post-processor's template states: bos before a text, eos after it, a separator between two."""
    adds: dict[str, bool] = {}
    for template in _templates(tokenizer):
        adds |= _adds_of_template(template, named)
    return adds


def _templates(tokenizer: Object) -> list[Object]:
    processor = tokenizer.get("post_processor")
    if not isinstance(processor, Mapping):
        return []
    return [
        nested
        for nested in objects(processor.get("processors", [processor]))
        if nested.get("type") == "TemplateProcessing"
    ]


def _adds_of_template(processor: Object, named: Mapping[str, str]) -> dict[str, bool]:
    single = _items(processor.get("single"))
    pair = _items(processor.get("pair"))
    first = last = None
    adds: dict[str, bool] = {}
    if len(single) > 1:
        first, last = single[0][0], single[-1][0]
        if first:
            adds["bos"] = first in (named.get("bos"), named.get("cls"))
        if last:
            adds["eos"] = last == named.get("eos")
    if first and pair and pair[0][0] == first:
        pair = pair[1:]
    if last and pair and pair[-1][0] == last:
        pair = pair[:-1]
    between = pair[1:-1]
    if between and pair[0][1] == "A" and pair[-1][1] == "B":
        separators = [token for token in (named.get("sep"), named.get("eos")) if token]
        adds["sep"] = (between[0][0] in separators and not last) or (len(between) == 2 and between[1][0] in separators)
    return adds


def _items(template: Any) -> list[tuple[str | None, str | None]]:
    """(special token, sequence) for each item of a template; one of the two is None."""
    items = []
    for item in objects(template):
        token, sequence = item.get("SpecialToken"), item.get("Sequence")
        token = token.get("id") if isinstance(token, Mapping) else None
        items.append((token, sequence.get("id") if isinstance(sequence, Mapping) else None))
    return items
