"""JSON files: chat templates, indexes, Keras objects, modules and texts in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gemma2tool.containers import strict_json
from gemma2tool.containers.tokenizer_json import added_entries
from gemma2tool.errors import InputRefused
from gemma2tool.formats.tokenizers.files import MAX_JSON_BYTES, templates_of
from gemma2tool.model.tokenizer import DEFAULT_TEMPLATE
from gemma2tool.pipeline.scan import imports, keras
from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.finding import ScanFinding
from gemma2tool.pipeline.scan.template import scan_template
from gemma2tool.pipeline.scan.text import scan_text
from gemma2tool.storage.quoting import quoted

_LIMITS = ("json.too-large", "json.too-many-values")
"""What makes a file too long for the strict reader, but not for others."""
_MAX_TEXTS = 100_000
_Pairs = list[tuple[str, Any]]


def scan_json(name: str, data: bytes, nbytes: int, place: Place) -> Iterator[ScanFinding]:
    """The findings of a file ``name`` of ``nbytes`` bytes, of which ``data`` is the beginning.

    What the strict reader refuses is read again as loaders read it: NaN, deep nesting, a byte order mark, UTF-16 and
    keys that occur twice hide nothing.
    """
    if nbytes > min(len(data), MAX_JSON_BYTES):
        yield place.finding(
            "files.unread", f"{name}: has {nbytes:,} bytes; at most {MAX_JSON_BYTES:,} are read", severity="odd"
        )
        return
    try:
        contents = [strict_json.load(data, what=name, max_bytes=MAX_JSON_BYTES)]
    except InputRefused as error:
        yield unread(place, error, severity="odd" if error.id in _LIMITS else None)
        contents = [] if error.id in _LIMITS else _as_others_read_it(data)
    findings = (finding for content in contents for finding in _value(name, content, place))
    yield from dict.fromkeys(findings)


def unread(place: Place, error: InputRefused, severity: Any = None) -> ScanFinding:
    """The finding for a file that its reader refuses; other readers take one of what is there twice."""
    id = "files.ambiguous" if ".duplicate-" in error.id else "files.unread"
    return place.finding(id, error.message, severity=severity)


def scan_templates(content: Mapping[str, Any], place: Place) -> Iterator[ScanFinding]:
    """The findings of a config's chat templates."""
    for label, template in templates_of(content.get("chat_template")).items():
        part = place.part("chat_template" if label == DEFAULT_TEMPLATE else f"chat_template {quoted(label)}")
        yield from scan_template(template, part)


def _as_others_read_it(data: bytes) -> list[Any]:
    """The values of a file that is not strict JSON: with the last and with the first of equal keys; none if Python's
    reader refuses it, too.
    """

    def first(pairs: _Pairs) -> dict[str, Any]:
        return dict(pairs[::-1])

    hooks: tuple[Callable[[_Pairs], Any], ...] = (dict, first)
    try:
        text = data.decode(json.detect_encoding(data), "surrogatepass")
        return [json.loads(text, object_pairs_hook=hook, parse_int=_integer) for hook in hooks]
    except (ValueError, RecursionError):
        return []


def _integer(digits: str) -> float:
    """A number for the digits of an integer, however many there are."""
    return float(digits)


def _value(name: str, content: Any, place: Place) -> Iterator[ScanFinding]:
    yield from imports.scan_imports(name, content, place)
    if not isinstance(content, dict):
        return
    if name == "tokenizer.json":
        for entry in added_entries(content).values():
            yield from _token(entry.content, place.part("added_tokens"))
        return
    yield from scan_templates(content, place)
    yield from _index(content.get("weight_map"), place)
    yield from keras.scan_architecture(content, place)
    yield from _texts({key: value for key, value in content.items() if key != "chat_template"}, place)


def _index(weight_map: Any, place: Place) -> Iterator[ScanFinding]:
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    escaping = [file for file in files if not isinstance(file, str) or "/" in file or "\\" in file or ".." in file]
    if escaping:
        yield place.finding("files.escape", f"it names the file {quoted(escaping[0])}")


def _texts(content: Mapping[str, Any], place: Place) -> Iterator[ScanFinding]:
    """The texts of a config: tokens, names, descriptions."""
    queue: list[tuple[str, Any]] = list(content.items())
    for key, value in queue:
        if isinstance(value, str):
            yield from scan_text(value, place.part(key))
        elif isinstance(value, dict) and len(queue) < _MAX_TEXTS:
            queue += value.items()
        elif isinstance(value, list) and len(queue) < _MAX_TEXTS:
            queue += [(key, item) for item in value]


def _token(text: object, place: Place) -> Iterator[ScanFinding]:
    if isinstance(text, str):
        for finding in scan_text(text, place):
            yield place.finding(finding.id, f"{quoted(text)}: {finding.message}")
