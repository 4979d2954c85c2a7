"""JSON from untrusted files: bounded before it is parsed, and with one meaning only."""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator
from itertools import accumulate
from math import isfinite
from typing import Any, NoReturn

from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import read_whole

# Gemma's tokenizer.json holds about 2.3 million values.
DEFAULT_MAX_VALUES = 4_000_000
_QUICK = 1 << 20  # brackets or quotes that take no time to speak of

# Possessive, and an unclosed string runs to the end: linear in time whatever the bytes.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_STRINGS = re.compile(rb'(?:[^"]*+"[^"\\]*+(?:\\.[^"\\]*+)*+"){1,4096}+', re.DOTALL)
_DEPTH_STEP = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NOT_BRACKETS = bytes(sorted(set(range(256)) - set(b"[]{}")))


def load(
    source: str | os.PathLike[str] | bytes | bytearray,
    *,
    what: str,
    max_bytes: int,
    max_depth: int = 64,
    max_values: int = DEFAULT_MAX_VALUES,
    allow_nonfinite: bool = False,
) -> Any:
    """The value of a JSON file, or of the bytes of one.

    ``what`` names it in messages. Raises InputRefused for more than ``max_bytes`` bytes, ``max_depth`` nested brackets or
    ``max_values`` values, for anything but UTF-8, for duplicate keys (json and most libraries silently keep the last), and for
    NaN, Infinity and numbers too large to be anything else, unless ``allow_nonfinite``.
    """
    if isinstance(source, (bytes, bytearray)):
        data, place = bytes(source), what
        if len(data) > max_bytes:
            raise InputRefused("json.too-large", f"{place}: {len(data)} bytes; at most {max_bytes} are accepted")
    else:
        data, place = read_whole(source, what=what, max_bytes=max_bytes), str(source)
    _check_size(data, place, max_depth, max_values)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputRefused("json.utf8", f"{place}: byte {error.start} is not UTF-8") from error

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            key = next(key for key, _ in items if key in seen or seen.add(key))
            raise InputRefused(
                "json.duplicate-key", f"{place}: the key {quoted(key)} appears twice", hint="remove one of the two"
            )
        return result

    def constant(name: str) -> NoReturn:
        raise InputRefused("json.nonfinite", f"{place}: {name} is no number")

    def number(digits: str) -> float:
        value = float(digits)
        return value if isfinite(value) else constant(quoted(digits))

    hooks = {} if allow_nonfinite else {"parse_constant": constant, "parse_float": number}
    try:
        return json.loads(text, object_pairs_hook=pairs, **hooks)
    except json.JSONDecodeError as error:
        raise InputRefused(
            "json.syntax", f"{place}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets that never close
        raise InputRefused("json.syntax", f"{place}: not acceptable JSON: {quoted(str(error))}") from error


def _check_size(data: bytes, place: str, max_depth: int, max_values: int) -> None:
    """Bounds nesting and the number of values in one pass over the bytes, before any Python object is made of them."""
    depth, values = 0, 1
    # At a glance: a value has two brackets or two texts at most, its key's and its own. What follows takes time for each of them.
    if data.count(b'"') - data.count(b'\\"') > max(4 * max_values, _QUICK):
        raise InputRefused("json.too-many-values", f"{place}: more than {max_values} values")
    for skeleton in _skeletons(data):
        brackets = skeleton.translate(_DEPTH_STEP, _NOT_BRACKETS)
        if len(brackets) > max(2 * max_values, _QUICK):
            raise InputRefused("json.too-many-values", f"{place}: more than {max_values} values")
        steps = array("b", brackets)
        if max(accumulate(steps, initial=depth)) > max_depth:
            raise InputRefused("json.depth", f"{place}: nested more than {max_depth} deep")
        depth += sum(steps)
        # Every value but the first of its list or object follows a comma.
        values += skeleton.count(b",") + steps.count(1)
        if values > max_values:
            raise InputRefused("json.too-many-values", f"{place}: more than {max_values} values")


def _skeletons(data: bytes) -> Iterator[bytes]:
    """What lies between the strings, a few thousand of them at a time so that the pieces need no memory to speak of."""
    at = 0
    while at < len(data):
        run = _STRINGS.match(data, at)
        end = run.end() if run else len(data)
        yield _STRING.sub(b"", data[at:end])
        at = end
