"""Tokenizer files of the same kind on both sides: what tokenizer.json holds beyond the canonical tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from gemma2tool.model.checkpoint import Assets, Checkpoint
from gemma2tool.verify.compare.consumers import holds_tokenizer
from gemma2tool.verify.compare.tokenizer_json import GATE, NAME, compare_json
from gemma2tool.verify.finding import Finding, Severity, Sides


def compare_files(source: Checkpoint, candidate: Checkpoint, sides: Sides) -> list[Finding]:
    """tokenizer.json against tokenizer.json where both sides carry their own; else whether each side's files agree."""
    if not _is_own(source.assets) or not _is_own(candidate.assets):
        return [*_lost(source, candidate, sides), *_conflicts(source, candidate, sides)]
    data = source.assets[NAME], candidate.assets[NAME]
    contents = [_object(bytes) for bytes in data]
    if data[0] == data[1] and contents[0]:
        return []
    for side, content in zip(sides, contents, strict=True):
        if not content:
            return [Finding(GATE, "error", NAME, f"the {side}'s {NAME} is not a JSON object")]
    return compare_json(contents[0], contents[1], sides, adds_bos=source.tokenizer.adds.get("bos") is True)


def _is_own(assets: Assets) -> bool:
    return NAME in assets and not assets.derived


def _lost(source: Checkpoint, candidate: Checkpoint, sides: Sides) -> Iterator[Finding]:
    """tokenizer.json that transformers would load, missing from a folder that has a place for it."""
    if not _is_own(source.assets) or NAME in candidate.assets or not holds_tokenizer(candidate):
        return
    if "tokenizer.model" in candidate.assets:
        message = (
            f"the {sides[0]}'s {NAME} is not in the {sides[1]}: transformers must make it from tokenizer.model,"
            " for which it needs protobuf"
        )
        yield Finding(GATE, "warning", NAME, message)
    elif "tokenizer.model" not in source.assets:
        yield Finding(GATE, "warning", NAME, f"the {sides[0]}'s {NAME}, its only tokenizer, is not in the {sides[1]}")


def _conflicts(source: Checkpoint, candidate: Checkpoint, sides: Sides) -> Iterator[Finding]:
    """A side whose tokenizer.json is another tokenizer than its tokenizer.model, of which the other side has only one.

    An error against a GGUF, whose consumer runs what was made from tokenizer.model.
    """
    derived = source.assets.derived or candidate.assets.derived
    for side, checkpoint in zip(sides, (source, candidate), strict=True):
        for conflict in checkpoint.tokenizer.conflicts:
            severity: Severity = "error" if conflict.serious and derived else "warning"
            yield Finding(GATE, severity, NAME, f"in the {side}, {conflict.message}")


def _object(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
