"""Tokenizer files of the same kind on both sides: what tokenizer.json holds beyond the canonical tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from gemma2tool.containers import tokenizer_model
from gemma2tool.errors import InputRefused
from gemma2tool.model.checkpoint import Assets, Checkpoint
from gemma2tool.verify.compare.consumers import holds_tokenizer
from gemma2tool.verify.compare.tokenizer_json import GATE, NAME, compare_json
from gemma2tool.verify.finding import Finding, Severity, Sides, the

MODEL = "tokenizer.model"


def compare_files(source: Checkpoint, candidate: Checkpoint, sides: Sides) -> list[Finding]:
    """Files of one name that both sides carry, as their own: the special ids of tokenizer.model, and tokenizer.json.

    Where a side has no tokenizer.json of its own: whether each side's files agree.
    """
    return [*_special_ids(source.assets, candidate.assets, sides), *_compare_json(source, candidate, sides)]


def _special_ids(source: Assets, candidate: Assets, sides: Sides) -> Iterator[Finding]:
    """The special ids that programs which read tokenizer.model alone use, whatever the other files say."""
    if source.derived or candidate.derived or MODEL not in source or MODEL not in candidate:
        return
    if source[MODEL] == candidate[MODEL]:
        return
    ids = []
    for side, assets in zip(sides, (source, candidate), strict=True):
        try:
            ids.append(tokenizer_model.parse(assets[MODEL]).special_ids())
        except InputRefused as refused:
            yield Finding(GATE, "error", MODEL, f"{the(side)}'s {MODEL} cannot be read: {refused.message}")
            return
    expected, actual = ids
    for role, token in expected.items():
        if actual[role] != token:
            severity: Severity = "warning" if -1 in (token, actual[role]) else "error"
            message = f"{role} of {MODEL} is {token}, in {the(sides[1])} {actual[role]}"
            yield Finding(GATE, severity, f"{role}_id", message)


def _compare_json(source: Checkpoint, candidate: Checkpoint, sides: Sides) -> list[Finding]:
    if not _is_own(source.assets) or not _is_own(candidate.assets):
        return [*_lost(source, candidate, sides), *_conflicts(source, candidate, sides)]
    data = source.assets[NAME], candidate.assets[NAME]
    contents = [_object(bytes) for bytes in data]
    if data[0] == data[1] and contents[0]:
        return []
    for side, content in zip(sides, contents, strict=True):
        if not content:
            return [Finding(GATE, "error", NAME, f"{the(side)}'s {NAME} is not a JSON object")]
    return compare_json(contents[0], contents[1], sides, adds_bos=source.tokenizer.adds.get("bos") is True)


def _is_own(assets: Assets) -> bool:
    return NAME in assets and not assets.derived


def _lost(source: Checkpoint, candidate: Checkpoint, sides: Sides) -> Iterator[Finding]:
    """tokenizer.json that transformers would load, missing from a folder that has a place for it."""
    if not _is_own(source.assets) or NAME in candidate.assets or not holds_tokenizer(candidate):
        return
    if "tokenizer.model" in candidate.assets:
        message = (
            f"{the(sides[0])}'s {NAME} is not in {the(sides[1])}: transformers must make it from tokenizer.model,"
            " for which it needs protobuf"
        )
        yield Finding(GATE, "warning", NAME, message)
    elif "tokenizer.model" not in source.assets:
        yield Finding(GATE, "warning", NAME, f"{the(sides[0])}'s {NAME}, its only tokenizer, is not in {the(sides[1])}")


def _conflicts(source: Checkpoint, candidate: Checkpoint, sides: Sides) -> Iterator[Finding]:
    """A side whose tokenizer.json is another tokenizer than its tokenizer.model, of which the other side has only one.

    An error against a GGUF, whose consumer runs what was made from tokenizer.model.
    """
    derived = source.assets.derived or candidate.assets.derived
    for side, checkpoint in zip(sides, (source, candidate), strict=True):
        for conflict in checkpoint.tokenizer.conflicts:
            severity: Severity = "error" if conflict.serious and derived else "warning"
            yield Finding(GATE, severity, NAME, f"in {the(side)}, {conflict.message}")


def _object(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
