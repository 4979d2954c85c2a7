"""The files beside tokenizer.model: tokenizer.json, which transformers loads, the special tokens, the chat template, and where
generation stops."""

from __future__ import annotations

import json
from typing import Any

from gemma2tool.model.checkpoint import Assets, Checkpoint
from gemma2tool.verify.compare.consumers import holds_tokenizer
from gemma2tool.verify.compare.tokenizer_json import GATE, NAME, compare_json
from gemma2tool.verify.finding import Finding, Severity, Sides

_RULES = ("add_bos_token", "add_eos_token")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_JSON = NAME


def compare_files(source: Checkpoint, candidate: Checkpoint, sides: Sides) -> list[Finding]:
    """What the two sides' files say otherwise, and what the candidate lost that its format has a place for."""
    ours, theirs = source.assets, candidate.assets
    return [
        *_template(source, candidate, sides),
        *_rules(ours, theirs, sides),
        *_lost_json(source, candidate, sides),
        *_json_files(ours, theirs, sides, "gguf" in (source.format, candidate.format)),
        *_stops(ours, theirs, sides),
    ]


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


def _template(source: Checkpoint, candidate: Checkpoint, sides: Sides) -> list[Finding]:
    mine, its = chat_template(source.assets), chat_template(candidate.assets)
    if mine is None or mine == its:
        return []
    if its is None:
        severity: Severity = "error" if holds_tokenizer(candidate) and _has_tokenizer(candidate) else "warning"
        return [Finding(GATE, severity, "chat_template", f"the {sides[0]}'s chat template is not in the {sides[1]}")]
    return [Finding(GATE, "error", "chat_template", "the chat templates differ")]


def _has_tokenizer(checkpoint: Checkpoint) -> bool:
    return "tokenizer.model" in checkpoint.assets or _JSON in checkpoint.assets


def _lost_json(source: Checkpoint, candidate: Checkpoint, sides: Sides) -> list[Finding]:
    """tokenizer.json that transformers would load, gone from a folder that has a place for it."""
    if _JSON not in source.assets or _JSON in candidate.assets or not holds_tokenizer(candidate):
        return []
    if "tokenizer.model" in candidate.assets:
        said = f"the {sides[0]}'s {_JSON} is not in the {sides[1]}: transformers must make it of tokenizer.model, for which it needs protobuf"
    elif "tokenizer.model" not in source.assets:
        said = f"the {sides[0]}'s {_JSON}, its only tokenizer, is not in the {sides[1]}"
    else:
        return []  # the whole tokenizer is lost: the gate's own finding
    return [Finding(GATE, "warning", _JSON, said)]


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


def _json_files(ours: Assets, theirs: Assets, sides: Sides, derived: bool) -> list[Finding]:
    """tokenizer.json where both sides carry it."""
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
    adds_bos = _object(ours, "tokenizer_config.json").get("add_bos_token") is True
    return compare_json(left, right, sides, adds_bos=adds_bos, derived=derived)


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
    return {
        int(token): _text(entry)
        for token, entry in added.items()
        if token.isascii() and token.isdigit() and len(token) < 10
    }


def _object(assets: Assets, name: str) -> dict[str, Any]:
    if name not in assets:
        return {}
    try:
        content = json.loads(assets[name])
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
