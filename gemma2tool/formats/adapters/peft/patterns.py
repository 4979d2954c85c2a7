"""Regular expressions of an untrusted ``adapter_config.json``, matched against the names of modules.

One that could take forever is matched in a limited process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from gemma2tool.formats.adapters.adapter import refused
from gemma2tool.storage import limited_process
from gemma2tool.storage.quoting import quoted

MAX_PATTERN, _SHORT = 4096, 512
_FEW_CHOICES, _MOST_CHOICES = 3, 16
_LIST = "list the modules by name in adapter_config.json"
_MATCHING_SECONDS, _MATCHING_MEMORY = 1, 64 << 20


def matching(pattern: str, names: Iterable[str], field: str, path: Path) -> set[str]:
    """The names that a pattern matches as a whole (peft's ``match_target_against_key``)."""
    names = list(names)
    return {
        name
        for name, first in zip(names, _first(re.fullmatch, [pattern], names, field, path), strict=True)
        if first == 0
    }


def first_suffix_pattern(patterns: Sequence[str], names: Sequence[str], field: str, path: Path) -> list[int | None]:
    """For every name the index of the first pattern that matches its end (peft's ``get_pattern_key``)."""
    for pattern in patterns:
        if re.search(r"\)[*+{]", pattern) or _choices(pattern) > _MOST_CHOICES:
            raise refused(
                "pattern", path, f"{field} has the pattern {quoted(pattern)}, whose matching might not end", hint=_LIST
            )
    return _first(re.match, [rf"(.*\.)?({pattern})$" for pattern in patterns], names, field, path)


Matcher = Callable[[str, str], "re.Match[str] | None"]


def _first(match: Matcher, patterns: Sequence[str], names: Sequence[str], field: str, path: Path) -> list[int | None]:
    """The index of the first pattern that matches each name. Raises ``InputRefused`` for patterns that are none or
    take too long.
    """
    if not patterns or not names:
        return [None] * len(names)
    if longest := next((pattern for pattern in patterns if len(pattern) > MAX_PATTERN), None):
        raise refused("pattern", path, f"{field} has a pattern of {len(longest)} characters", hint=_LIST)

    def answer() -> str:
        try:
            return " ".join(
                str(next((index for index, pattern in enumerate(patterns) if match(pattern, name)), -1))
                for name in names
            )
        except (re.error, RecursionError, OverflowError):
            return "invalid"

    shown = quoted(patterns[0] if len(patterns) == 1 else field)
    if all(_is_bounded(pattern) for pattern in patterns):
        text = answer()
    elif not limited_process.is_available():
        raise refused("pattern", path, f"{field} is {shown}, whose matching might not end", hint=_LIST)
    else:
        try:
            text = limited_process.call(
                answer,
                cpu_seconds=_MATCHING_SECONDS,
                memory_bytes=_MATCHING_MEMORY,
                answer_bytes=8 * (len(names) + 1),
            )
        except limited_process.LimitExceeded:
            raise refused("pattern", path, f"{field} is {shown}, whose matching might not end", hint=_LIST) from None
    if text == "invalid":
        raise refused("pattern", path, f"{field} is {shown}, which is not a regular expression", hint=_LIST)
    return [None if index == "-1" else int(index) for index in text.split()]


def _is_bounded(pattern: str) -> bool:
    """Whether an untrusted regular expression has few ways to match.

    It has no repeated group, look-around or back-reference, and at most three repetitions and groups of alternatives.
    """
    pattern = pattern.removeprefix(r"(.*\.)?(").replace("(?:", "(")
    return (
        len(pattern) <= _SHORT and not re.search(r"\(\?|\)[*+?{]|\\\d", pattern) and _choices(pattern) <= _FEW_CHOICES
    )


def _choices(pattern: str) -> int:
    """How many repetitions and groups of alternatives there are."""
    return len(re.findall(r"[*+?{]|\([^()]*\|", re.sub(r"\\.", "", pattern.replace("(?:", "("))))
