"""JSON from untrusted files: its size is checked before it is parsed, and anything ambiguous is refused."""

from __future__ import annotations

import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from math import isfinite
from typing import Any, NoReturn

from gemma2tool.containers import file_kind
from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import read_whole

# Gemma's tokenizer.json has about 2.3 million values.
DEFAULT_MAX_VALUES = 4_000_000
_QUICK = 1 << 20  # this many brackets or quotes are scanned in negligible time

# Possessive, and an unclosed string runs to the end, so matching takes linear time for any input.
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
    """Parses a JSON file, or the bytes of one. ``what`` names it in messages.

    Raises InputRefused for more than ``max_bytes`` bytes, ``max_depth`` nested brackets or ``max_values`` values, for
    text that is not UTF-8, for duplicate keys (json and most libraries silently keep the last), and, unless
    ``allow_nonfinite`` is set, for NaN, Infinity and numbers that overflow to infinity.
    """
    if isinstance(source, (bytes, bytearray)):
        data, where = bytes(source), what
        if len(data) > max_bytes:
            raise InputRefused("json.too-large", f"{where}: {len(data)} bytes; at most {max_bytes} are accepted")
    else:
        data, where = read_whole(source, what=what, max_bytes=max_bytes), str(source)
    _refuse_pages(data, where)
    _check_size(data, where, max_depth, max_values)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputRefused("json.utf8", f"{where}: byte {error.start} is not UTF-8") from error

    def unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            counts = Counter(key for key, _ in items)
            key = next(key for key, count in counts.items() if count > 1)
            raise InputRefused(
                "json.duplicate-key", f"{where}: the key {quoted(key)} appears twice", hint="remove one of the two"
            )
        return result

    def refuse_nonfinite(name: str) -> NoReturn:
        raise InputRefused("json.nonfinite", f"{where}: {name} is not a finite number")

    def finite(digits: str) -> float:
        value = float(digits)
        return value if isfinite(value) else refuse_nonfinite(quoted(digits))

    parse_float, parse_constant = (None, None) if allow_nonfinite else (finite, refuse_nonfinite)
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_float=parse_float, parse_constant=parse_constant)
    except json.JSONDecodeError as error:
        raise InputRefused(
            "json.syntax", f"{where}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:  # an integer with thousands of digits; brackets that are never closed
        raise InputRefused("json.syntax", f"{where}: not acceptable JSON: {quoted(str(error))}") from error


def _refuse_pages(data: bytes, where: str) -> None:
    """Raises InputRefused for a file that a download left in place of JSON: a pointer, a page."""
    if data.lstrip()[:1] not in (b"{", b"["):
        kind = file_kind.identify(data[: file_kind.HEAD_BYTES], len(data))
        if kind is not None and kind.name in ("lfs-pointer", "html", "xml", "zeros"):
            raise file_kind.foreign(kind, where)


def _check_size(data: bytes, where: str, max_depth: int, max_values: int) -> None:
    """Checks nesting and the number of values in one pass over the bytes, before any Python object is made."""
    depth, values = 0, 1
    # A quick upper bound: a value has at most two brackets or two strings, its key and itself. The exact count below is
    # slower.
    if data.count(b'"') - data.count(b'\\"') > max(4 * max_values, _QUICK):
        raise InputRefused("json.too-many-values", f"{where}: more than {max_values} values")
    for skeleton in _skeletons(data):
        brackets = skeleton.translate(_DEPTH_STEP, _NOT_BRACKETS)
        if len(brackets) > max(2 * max_values, _QUICK):
            raise InputRefused("json.too-many-values", f"{where}: more than {max_values} values")
        steps = array("b", brackets)
        if max(accumulate(steps, initial=depth)) > max_depth:
            raise InputRefused("json.depth", f"{where}: nested more than {max_depth} deep")
        depth += sum(steps)
        # Every value except the first of a list or object follows a comma.
        values += skeleton.count(b",") + steps.count(1)
        if values > max_values:
            raise InputRefused("json.too-many-values", f"{where}: more than {max_values} values")


def _skeletons(data: bytes) -> Iterator[bytes]:
    """Yields the text between strings, a few thousand strings at a time to keep the pieces small."""
    at = 0
    while at < len(data):
        run = _STRINGS.match(data, at)
        end = run.end() if run else len(data)
        yield _STRING.sub(b"", data[at:end])
        at = end
