"""Which ids are bos, eos, unk and pad, and whether a text gets them: the rules of llama.cpp's converter, and repairs of its gaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma2tool.formats.tokenizers.files import TokenizerFiles, added_tokens_of
from gemma2tool.model.config import Gemma2Config

KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
GEMMA_TOKENS = {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"}


@dataclass
class SpecialTokens:
    """``ids`` by kind and ``add`` (whether a text gets the token), in the order in which they are written."""

    ids: dict[str, int] = field(default_factory=dict)
    add: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def of(
        cls, files: TokenizerFiles, tokens: Sequence[str], config: Gemma2Config, warnings: list[str]
    ) -> SpecialTokens:
        """``tokens``: the vocabulary's texts by id."""
        result = cls()
        texts = _texts(files.config)
        if files.config is None:
            texts = GEMMA_TOKENS | _texts(files.special_map)
        if files.json is not None:
            result.add = _template_adds(files.json, texts)
        for kind in KINDS:
            add = (files.config or {}).get(f"add_{kind}_token")
            if isinstance(add, bool):
                result.add[kind] = add
        added = {text: token for token, (text, _) in (added_tokens_of(None, files.json) or {}).items()}
        for kind in KINDS:
            if kind in texts and texts[kind] in added:
                result._set(kind, added[texts[kind]], tokens)
        for kind, token in (("bos", config.bos_token_id), ("eos", config.eos_token_id), ("pad", config.pad_token_id)):
            if isinstance(token, int):
                result._set(kind, token, tokens)
        result._repair(files, texts, tokens, config, warnings)
        return result

    def _set(self, kind: str, token: int, tokens: Sequence[str]) -> None:
        if 0 <= token < len(tokens):
            self.ids.setdefault(kind, token)

    def _repair(
        self,
        files: TokenizerFiles,
        texts: Mapping[str, str],
        tokens: Sequence[str],
        config: Gemma2Config,
        warnings: list[str],
    ) -> None:
        """What the converter leaves out though it can be known: llama.cpp would take its own defaults, which are not Gemma's."""
        needed = ("bos", "eos") if files.config is not None else ("bos", "eos", "unk", "pad")
        places = {text: token for token, text in reversed(list(enumerate(tokens)))}
        for kind in needed:
            if kind not in self.ids and texts.get(kind, GEMMA_TOKENS[kind]) in places:
                self._set(kind, places[texts.get(kind, GEMMA_TOKENS[kind])], tokens)
        if "eos" not in self.ids:
            for token in config.eos_token_ids:
                self._set("eos", token, tokens)
        missing = [kind for kind in needed if kind not in self.ids]
        if missing:
            warnings.append(f"the tokenizer's files do not tell the id of {', '.join(missing)}: the GGUF leaves it out")
        if files.config is None and "bos" not in self.add:
            self.add = {"bos": True, **self.add}
        if files.config is None and "eos" not in self.add:
            self.add["eos"] = False


def _texts(source: Mapping[str, Any] | None) -> dict[str, str]:
    """The special tokens' texts by kind; an entry is a text or an object with its ``content``."""
    result = {}
    for kind in KINDS:
        entry = (source or {}).get(f"{kind}_token")
        text = entry.get("content") if isinstance(entry, Mapping) else entry
        if isinstance(text, str):
            result[kind] = text
    return result


def _template_adds(tokenizer: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, bool]:
    """What the post-processor's template says: bos before a text, eos behind it, a separator between two."""
    processor = tokenizer.get("post_processor")
    if not isinstance(processor, Mapping):
        return {}
    found: dict[str, bool] = {}
    for each in processor.get("processors", [processor]):
        if isinstance(each, Mapping) and each.get("type") == "TemplateProcessing":
            found |= _adds_of_template(each, texts)
    return found


def _adds_of_template(processor: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, bool]:
    single = _items(processor.get("single"))
    pair = _items(processor.get("pair"))
    first = last = None
    found: dict[str, bool] = {}
    if len(single) > 1:
        first, last = single[0][0], single[-1][0]
        if first:
            found["bos"] = first in (texts.get("bos"), texts.get("cls"))
        if last:
            found["eos"] = last == texts.get("eos")
    if first and pair and pair[0][0] == first:
        pair = pair[1:]
    if last and pair and pair[-1][0] == last:
        pair = pair[:-1]
    between = pair[1:-1]
    if between and pair[0][1] == "A" and pair[-1][1] == "B":
        separators = [token for token in (texts.get("sep"), texts.get("eos")) if token]
        found["sep"] = (between[0][0] in separators and not last) or (len(between) == 2 and between[1][0] in separators)
    return found


def _items(template: object) -> list[tuple[str | None, str | None]]:
    """(special token, sequence) for each item of a template; one of the two is None."""
    items = []
    for item in template if isinstance(template, list) else ():
        if isinstance(item, Mapping):
            token, sequence = item.get("SpecialToken"), item.get("Sequence")
            token = token.get("id") if isinstance(token, Mapping) else None
            items.append((token, sequence.get("id") if isinstance(sequence, Mapping) else None))
    return items
