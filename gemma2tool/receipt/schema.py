"""The receipt's JSON schema, and a validator for the part of JSON Schema that it uses: the file that documents receipts
also checks them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from gemma2tool.storage.quoting import quoted

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_MAXIMA: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("maximum", (int, float)),
    ("maxItems", (list,)),
    ("maxLength", (str,)),
    ("maxProperties", (dict,)),
)
_MINIMA: tuple[tuple[str, tuple[type, ...]], ...] = (("minimum", (int, float)), ("minItems", (list,)))


@cache
def schema() -> Mapping[str, Any]:
    """The schema of receipts, as JSON Schema 2020-12."""
    content: Mapping[str, Any] = json.loads(Path(__file__).with_name("receipt.schema.json").read_text())
    return content


def violation(value: Any, rule: Mapping[str, Any], place: str = "") -> str | None:
    """The first violation of ``rule`` in ``value``, as "PLACE: WHAT"; None where there is none.

    Supports $ref into $defs, type, const, enum, pattern, required, properties, additionalProperties and items as
    schemas, and the bounds minimum, maximum, minItems, maxItems, maxLength and maxProperties.
    """
    if "$ref" in rule:
        rule = schema()["$defs"][rule["$ref"].removeprefix("#/$defs/")]
    wrong = _own_violation(value, rule)
    if wrong:
        return f"{place or 'the receipt'}: {wrong}"
    if isinstance(value, dict):
        missing = [name for name in rule.get("required", ()) if name not in value]
        if missing:
            return f"{place or 'the receipt'}: {missing[0]} is missing"
        known, others = rule.get("properties", {}), rule.get("additionalProperties", {})
        parts = [(f"{place}.{name[:100]}".lstrip("."), part, known.get(name, others)) for name, part in value.items()]
    elif isinstance(value, list):
        parts = [(f"{place}[{index}]", part, rule.get("items", {})) for index, part in enumerate(value)]
    else:
        return None
    for where, part, part_rule in parts:
        if inner := violation(part, part_rule, where):
            return inner
    return None


def _own_violation(value: Any, rule: Mapping[str, Any]) -> str | None:
    """What is wrong with ``value`` itself, apart from what it contains."""
    allowed = rule.get("type", list(_TYPES))
    allowed = [allowed] if isinstance(allowed, str) else allowed
    types = tuple(type for name in allowed for type in _TYPES[name])
    if not isinstance(value, types) or (isinstance(value, bool) and "boolean" not in allowed):
        return f"is {_shown(value)}, must be {' or '.join(allowed)}"
    if "const" in rule and (value != rule["const"] or isinstance(value, bool)):
        return f"is {_shown(value)}, must be {_shown(rule['const'])}"
    if "enum" in rule and value not in rule["enum"]:
        return f"is {_shown(value)}, must be one of {', '.join(rule['enum'])}"
    if isinstance(value, str) and not re.search(rule.get("pattern", ""), value):
        return f"is {_shown(value)}, must match {rule['pattern']}"
    size = len(value) if isinstance(value, (str, list, dict)) else value
    for name, bounded in _MAXIMA:
        if name in rule and isinstance(value, bounded) and size > rule[name]:
            return f"is {_shown(size)}, at most {rule[name]}"
    for name, bounded in _MINIMA:
        if name in rule and isinstance(value, bounded) and size < rule[name]:
            return f"is {_shown(size)}, at least {rule[name]}"
    return None


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return quoted(value) if isinstance(value, str) else json.dumps(value)
