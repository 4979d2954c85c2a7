"""tokenizer.json against tokenizer.json: would the same text give different ids, or the same ids a different text?

Decided from the contents, with no library to run them: spellings that mean the same are brought to one form
(``containers.tokenizer_json``), and whatever differs then is a difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from gemma2tool.containers.tokenizer_json import (
    FLAGS,
    STEPS,
    AddedEntry,
    Object,
    added_entries,
    flat_steps,
    found_whole,
    merge_pairs,
    model_of,
    model_options,
    spells_every_byte,
    steps,
)
from gemma2tool.containers.tokenizer_model import SPACE
from gemma2tool.model.tokenizer import looks_special
from gemma2tool.verify.finding import Finding, Severity, Sides, the

GATE = "tokenizer"
NAME = "tokenizer.json"

SPECIAL = "added_tokens.special"
"""The subject of findings about what a decoded text leaves out on request; texts have the same ids."""

_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
"""Gemma's: a token without a U+2581 is found in the normalized text just where it is found in the text."""

_ALONE, _PAIR = ("A",), ("A", "B")


def compare_json(left: Object, right: Object, sides: Sides, *, adds_bos: bool = False) -> list[Finding]:
    """The differences between the contents of two files, ``left`` being the source's.

    ``adds_bos``: the left side's tokenizer_config.json has bos put before a text though its tokenizer.json may not.
    """
    return [
        *_models(left, right, sides),
        *_added_tokens(left, right, sides),
        *_steps(left, right, sides),
        *_around(left, right, sides, adds_bos),
        *_limits(left, right),
    ]


def _error(message: str, subject: str = NAME) -> Finding:
    return Finding(GATE, "error", subject, message)


def _models(left: Object, right: Object, sides: Sides) -> Iterator[Finding]:
    models = model_of(left), model_of(right)
    added = _added_texts(left) | _added_texts(right)
    if _vocabulary(left) - added != _vocabulary(right) - added:
        yield _error(f"the vocabularies of {NAME} differ")
    idle = _found_whole(left) & _found_whole(right)
    if merge_pairs(models[0], idle) != merge_pairs(models[1], idle):
        yield _error(f"the merges of {NAME} differ")
    options = model_options(models[0]), model_options(models[1])
    for name in sorted(options[0].keys() | options[1].keys()):
        values = options[0].get(name), options[1].get(name)
        if name == "unk_token" and None in values and all(map(spells_every_byte, models)):
            continue  # no text produces it
        if values[0] != values[1]:
            yield _error(f"{name} of {NAME}'s model is {_short(values[0])}, in {the(sides[1])} {_short(values[1])}")


def _vocabulary(content: Object) -> set[tuple[str, Any]]:
    """The model's texts with their ids."""
    vocab = model_of(content).get("vocab")
    return {(text, token) for text, token in vocab.items()} if isinstance(vocab, Mapping) else set()


def _added_texts(content: Object) -> set[tuple[Any, int]]:
    """Added tokens with their ids. Whether they stand in the model's vocabulary too makes no difference to any text."""
    return {(entry.content, token) for token, entry in added_entries(content).items()}


def _found_whole(content: Object) -> set[str]:
    entries = added_entries(content).values()
    texts = {entry.content: entry.flags["single_word"] for entry in entries if isinstance(entry.content, str)}
    return found_whole(texts)[0]


def _added_tokens(left: Object, right: Object, sides: Sides) -> Iterator[Finding]:
    """One finding per kind of difference, naming the first token."""
    source, candidate = added_entries(left), added_entries(right)
    lost = [token for token in source if token not in candidate]
    more = [token for token in candidate if token not in source]
    common = [token for token in source if token in candidate]
    spaces_alone = steps(left)["normalizer"] == steps(right)["normalizer"] == [_NORMALIZER]
    renamed = [token for token in common if source[token].content != candidate[token].content]
    if lost:
        message = f"{the(sides[1])}'s {NAME} lacks the added token {_token(source, lost[0])}{_others(lost)}"
        yield _error(message, "added_tokens")
    if more:
        message = f"{the(sides[1])}'s {NAME} has an additional added token, {_token(candidate, more[0])}{_others(more)}"
        yield _error(message, "added_tokens")
    if renamed:
        first = renamed[0]
        message = (
            f"the added tokens of {NAME} differ: {_token(source, first)}, in {the(sides[1])}"
            f" {candidate[first].content!r}{_others(renamed)}"
        )
        yield _error(message, "added_tokens")
    for flag in FLAGS:
        wrong = [token for token in common if source[token].flags[flag] != candidate[token].flags[flag]]
        if flag == "normalized" and spaces_alone:
            wrong = [token for token in wrong if SPACE in str(source[token].content)]
        wrong.sort(key=lambda token: looks_special(str(source[token].content)))
        if wrong:
            first = wrong[0]
            message = (
                f"the added token {_token(source, first)} of {NAME} has {flag} {source[first].flags[flag]}, in the"
                f" {sides[1]} {candidate[first].flags[flag]}{_others(wrong)}"
            )
            harmless = flag == "special" and looks_special(str(source[first].content))
            severity: Severity = "warning" if harmless else "error"
            yield Finding(GATE, severity, SPECIAL if flag == "special" else "added_tokens", message)


def _token(entries: Mapping[int, AddedEntry], token: int) -> str:
    return f"{entries[token].content!r} ({token})"


def _others(tokens: list[int]) -> str:
    return f" (and {len(tokens) - 1} more)" if len(tokens) > 1 else ""


def _steps(left: Object, right: Object, sides: Sides) -> Iterator[Finding]:
    source, candidate = steps(left), steps(right)
    for part in STEPS:
        if source[part] != candidate[part]:
            names = [
                " then ".join(str(step.get("type")) for step in flat[part]) or "none" for flat in (source, candidate)
            ]
            difference = f"{names[0]}, in {the(sides[1])} {names[1]}"
            if names[0] == names[1]:
                difference = f"{names[0]}, with other settings"
            yield _error(f"the {part} of {NAME} differs: {difference}", part)


def _around(left: Object, right: Object, sides: Sides, adds_bos: bool) -> Iterator[Finding]:
    """What is put around a text, and around a pair of them."""
    source, candidate = _templates(left.get("post_processor")), _templates(right.get("post_processor"))
    for kind in ("single", "pair"):
        templates = source[kind], candidate[kind]
        if templates[0] == templates[1]:
            continue
        text = "a text" if kind == "single" else "a pair of texts"
        names = [{name for name, _ in _special(template)} for template in templates]
        message = f"{NAME} puts {_put(templates[0])} around {text}, in {the(sides[1])} {_put(templates[1])}"
        lost = bool(names[0]) and not names[0] & names[1]
        supplied = adds_bos and not _special(templates[0])
        subject = "add_bos_token" if lost else "post_processor"
        yield Finding(GATE, "warning" if supplied else "error", subject, message)
        return
    if source["other"] != candidate["other"]:
        yield _error(f"the post_processor of {NAME} differs", "post_processor")


def _templates(processor: Any) -> dict[str, Any]:
    """What surrounds one text and two, as tuples of "A", "B" and (text, ids) of special tokens; other processors as
    they are.
    """
    templates: dict[str, Any] = {"single": _ALONE, "pair": _PAIR, "other": []}
    for step in flat_steps(processor, "processors"):
        if step.get("type", "TemplateProcessing") == "TemplateProcessing":
            known = step.get("special_tokens")
            for kind in ("single", "pair"):
                if isinstance(step.get(kind), list):
                    parts = (_part(part, known if isinstance(known, dict) else {}) for part in step[kind])
                    templates[kind] = tuple(parts)
        elif step.get("type") != "ByteLevel":  # it only shifts offsets
            templates["other"].append(step)
    return templates


def _part(part: Any, known: Object) -> Any:
    if isinstance(part, dict) and isinstance(part.get("Sequence"), dict):
        return str(part["Sequence"].get("id"))
    if isinstance(part, dict) and isinstance(part.get("SpecialToken"), dict):
        name = str(part["SpecialToken"].get("id"))
        entry = known.get(name)
        ids = entry.get("ids") if isinstance(entry, dict) else None
        return name, json.dumps(ids) if ids is not None else "(without an id)"
    return repr(part)


def _special(template: Any) -> tuple[tuple[str, str], ...]:
    return tuple(part for part in template if isinstance(part, tuple))


def _put(template: Any) -> str:
    return " and ".join(f"{name} {ids}" for name, ids in dict.fromkeys(_special(template))) or "nothing"


def _limits(left: Object, right: Object) -> Iterator[Finding]:
    """transformers sets both anew in each call; a program that runs the file as it is uses them."""
    for name in ("truncation", "padding"):
        if left.get(name) != right.get(name):
            message = f"the {name} of {NAME} differs, which programs other than transformers use"
            yield Finding(GATE, "warning", name, message)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
