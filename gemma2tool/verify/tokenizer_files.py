"""The files beside tokenizer.model: tokenizer.json, which transformers loads, the special tokens, the chat template, and where
generation stops."""

from __future__ import annotations

import json
from typing import Any

from gemma2tool.model.checkpoint import Assets
from gemma2tool.verify.result import Finding, Severity, Sides

GATE = "tokenizer"

_RULES = ("add_bos_token", "add_eos_token")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_JSON = "tokenizer.json"
_STEPS = ("normalizer", "pre_tokenizer", "decoder")
"""Parts of tokenizer.json that may be spelled in several ways and mean the same."""


def compare_files(ours: Assets, theirs: Assets, sides: Sides) -> list[Finding]:
    """What the two sides' files say otherwise. Of a file that only one side has, nothing is said: many formats have no place for it."""
    return [*_template(ours, theirs, sides), *_rules(ours, theirs, sides), *_json_files(ours, theirs, sides), *_stops(ours, theirs, sides)]


def chat_template(assets: Assets) -> str | None:
    """The default chat template, from whichever file has it; transformers' order of preference."""
    if "chat_template.jinja" in assets:
        return assets["chat_template.jinja"].decode("utf-8", "replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _object(assets, name).get("chat_template")
        if isinstance(template, list):
            named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template
    return None


def _template(ours: Assets, theirs: Assets, sides: Sides) -> list[Finding]:
    mine, its = chat_template(ours), chat_template(theirs)
    if mine is None or mine == its:
        return []
    if its is None:
        return [Finding(GATE, "warning", "chat_template", f"the {sides[0]}'s chat template is not in the {sides[1]}")]
    return [Finding(GATE, "error", "chat_template", "the chat templates differ")]


def _rules(ours: Assets, theirs: Assets, sides: Sides) -> list[Finding]:
    """Whether bos and eos are added, which texts the special tokens are, and what ids the added ones have."""
    findings = []
    left, right = (_object(assets, "tokenizer_config.json") for assets in (ours, theirs))
    for name in _RULES:
        if left.get(name) is not None and right.get(name) is not None and left[name] != right[name]:
            findings.append(Finding(GATE, "error", name, f"{name} is {left[name]}, in the {sides[1]} {right[name]}"))
    for name in _SPECIAL:
        mine, its = _text(left.get(name)), _text(right.get(name))
        if None not in (mine, its) and mine != its:
            severity: Severity = "error" if name in ("bos_token", "eos_token") else "warning"
            findings.append(Finding(GATE, severity, name, f"{name} is {mine!r}, in the {sides[1]} {its!r}"))
    mine, its = _added(left), _added(right)
    for token in sorted(mine.keys() & its.keys()):
        if mine[token] != its[token]:
            said = f"token {token} is {mine[token]!r}, in the {sides[1]} {its[token]!r}"
            findings.append(Finding(GATE, "error", "added_tokens", said))
            break
    return findings


def _json_files(ours: Assets, theirs: Assets, sides: Sides) -> list[Finding]:
    """tokenizer.json where both sides carry it: the same vocabulary, merges, added tokens and steps."""
    if _JSON not in theirs:
        return []
    right = _object(theirs, _JSON)
    broken = [Finding(GATE, "error", _JSON, f"the {sides[1]}'s {_JSON} is not a JSON object")]
    if _JSON not in ours or ours[_JSON] == theirs[_JSON]:
        return [] if right else broken
    left = _object(ours, _JSON)
    if not left:
        return [Finding(GATE, "error", _JSON, f"the {sides[0]}'s {_JSON} is not a JSON object")]
    if not right:
        return broken
    model, other = (each.get("model") if isinstance(each.get("model"), dict) else {} for each in (left, right))
    findings = []
    if model.get("vocab") != other.get("vocab"):
        findings.append(f"the vocabularies of {_JSON} differ")
    if _merges(model) != _merges(other):
        findings.append(f"the merges of {_JSON} differ")
    mine, its = (
        {each["id"]: each.get("content") for each in _list(side, "added_tokens") if isinstance(each.get("id"), int)}
        for side in (left, right)
    )
    if any(mine[token] != its[token] for token in mine.keys() & its.keys()):
        findings.append(f"the added tokens of {_JSON} differ")
    mine, its = _put_around(left), _put_around(right)
    wrong = [Finding(GATE, "error", _JSON, said) for said in findings]
    if mine != its and mine:
        said = f"{_JSON} puts {' and '.join(mine)} around a text, in the {sides[1]} {' and '.join(its) or 'nothing'}"
        wrong.append(Finding(GATE, "error", "add_bos_token" if mine[0] not in its else _JSON, said))
    if mine != its and not mine:
        wrong.append(Finding(GATE, "warning", _JSON, f"in the {sides[1]}, {_JSON} puts {' and '.join(its)} around a text"))
    steps = [step for step in _STEPS if step in left and step in right and left[step] != right[step]]
    return wrong + [Finding(GATE, "warning", _JSON, f"the {step} of {_JSON} is written otherwise") for step in steps]


def _put_around(content: dict[str, Any]) -> tuple[str, ...]:
    """The special tokens that tokenizer.json puts before and behind a text."""
    processor = content.get("post_processor")
    found = _list(processor, "processors") if isinstance(processor, dict) else []
    for each in [processor, *found] if isinstance(processor, dict) else []:
        tokens = [part["SpecialToken"].get("id") for part in _list(each, "single") if isinstance(part.get("SpecialToken"), dict)]
        if tokens:
            return tuple(map(str, tokens))
    return ()


def _stops(ours: Assets, theirs: Assets, sides: Sides) -> list[Finding]:
    """The ids at which generation stops: one that is lost lets a chat run on, one more can only end it."""
    mine, its = (_ids(_object(assets, "generation_config.json").get("eos_token_id")) for assets in (ours, theirs))
    if None in (mine, its) or mine == its:
        return []
    severity: Severity = "error" if mine - its else "warning"
    said = f"generation_config.json stops at {sorted(mine)}, in the {sides[1]} at {sorted(its)}"
    return [Finding(GATE, severity, "eos_token_id", said)]


def _ids(value: Any) -> set[int] | None:
    listed = value if isinstance(value, list) else [value]
    return set(listed) if listed and all(isinstance(each, int) for each in listed) else None


def _text(token: Any) -> str | None:
    """A special token's text, written plainly or as an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _added(content: dict[str, Any]) -> dict[int, str | None]:
    added = content.get("added_tokens_decoder")
    if not isinstance(added, dict):
        return {}
    return {int(token): _text(entry) for token, entry in added.items() if token.isascii() and token.isdigit() and len(token) < 10}


def _merges(model: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Merges as pairs, whether written "a b" or ["a", "b"]."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        return []
    return [tuple(each.split(" ", 1)) if isinstance(each, str) else tuple(each) if isinstance(each, list) else (each,) for each in merges]


def _list(content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = content.get(name)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _object(assets: Assets, name: str) -> dict[str, Any]:
    if name not in assets:
        return {}
    try:
        content = json.loads(assets[name])
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
