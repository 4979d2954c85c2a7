"""Characters that make text look otherwise than it reads: control characters, turned directions, invisible ones.

Sources: Unicode 16 (general categories; UAX 9 for the bidirectional controls, UTR 36 and the tags of U+E0000), the
joiners' use in scripts and emoji (UTS 51), GitHub's workflow commands.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.finding import ScanFinding

_CONTROL = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f"
_TURNS = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_INVISIBLE = "\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180e\u200b\u2060-\u2064\u206a-\u206f\u3164\ufeff\ufff9-\ufffb"
_INVISIBLE += "\U0001d173-\U0001d17a\U000e0000-\U000e007f\U000e0100-\U000e01ef"
_HALVES = "\ud800-\udfff"
"""Of surrogate pairs: no text has one alone; tokenizers and encoders stop at it."""
_JOINERS = "\u200c\u200d"

_ODD = re.compile(f"[{_CONTROL}{_TURNS}{_INVISIBLE}{_JOINERS}{_HALVES}]")
_KINDS = (
    ("text.control", re.compile(f"[{_CONTROL}]")),
    ("text.bidirectional", re.compile(f"[{_TURNS}]")),
    ("text.invisible", re.compile(f"[{_INVISIBLE}{_JOINERS}{_HALVES}]")),
)
_COMMAND = re.compile(r"##\[[a-zA-Z-]+\b|(?:^|\n)\s*::[a-z][a-z-]*\b")
_FLAG = "\U0001f3f4"
_LINE_BREAKS = re.compile(r"[\n\r\u2028\u2029]")


def scan_text(text: str, place: Place, *, one_line: bool = False, located: bool = False) -> Iterator[ScanFinding]:
    """The findings in one text. ``one_line``: it is a name, in which a line break forges a line. ``located``: the text
    is a whole file, so that its lines are the file's.
    """
    seen: dict[str, list[tuple[int, str]]] = {}
    for match in _ODD.finditer(text):
        character, at = match[0], match.start()
        if character in _JOINERS and _joins(text, at):
            continue
        if "\U000e0020" <= character <= "\U000e007f" and _in_flag(text, at):
            continue
        id = next(id for id, kind in _KINDS if kind.match(character))
        seen.setdefault(id, []).append((at, character))
    for id, found in seen.items():
        at, character = found[0]
        line = text.count("\n", 0, at) + 1
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        message = f"{_named(character)} at character {at + 1}{more}"
        yield place.finding(id, message, line=line if located else None)
    if one_line and (line_break := _LINE_BREAKS.search(text)):
        yield place.finding("text.control", f"a line break at character {line_break.start() + 1}")
    if command := _COMMAND.search(text):
        yield place.finding("text.workflow", f"{command[0].strip()!r}, a workflow command")


def _named(character: str) -> str:
    """``U+202E (RIGHT-TO-LEFT OVERRIDE)``"""
    name = unicodedata.name(character, "control character")
    return f"U+{ord(character):04X} ({name})"


def _joins(text: str, at: int) -> bool:
    """Whether a joiner is where scripts and emoji need one: between two letters or signs beyond Latin, Greek and
    Cyrillic.
    """
    before = text[at - 1 : at] if at else ""
    after = text[at + 1 : at + 2]
    return all(side and ord(side) > 0x52F and side not in _JOINERS for side in (before, after))


def _in_flag(text: str, at: int) -> bool:
    """Whether a tag follows the black flag, as in the flags of England, Scotland and Wales."""
    start = at
    while start > 0 and "\U000e0020" <= text[start - 1] <= "\U000e007f" and at - start < 8:
        start -= 1
    return text[start - 1 : start] == _FLAG
