"""The receipt's JSON schema, and the part of JSON Schema that it uses: the file that documents receipts also guards them."""

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


@cache
def schema() -> Mapping[str, Any]:
    """The schema of receipts, as JSON Schema 2020-12."""
    return json.loads(Path(__file__).with_name("receipt.schema.json").read_text())


def fault(value: Any, rule: Mapping[str, Any], place: str = "") -> str | None:
    """The first thing in ``value`` that ``rule`` does not allow, as "PLACE: WHAT"; None where all is well.

    Knows $ref into $defs, type, const, enum, pattern, required, properties, additionalProperties and items as schemas, and
    the bounds minimum, maximum, minItems, maxItems, maxLength and maxProperties.
    """
    if "$ref" in rule:
        rule = schema()["$defs"][rule["$ref"].removeprefix("#/$defs/")]
    wrong = _simple_fault(value, rule)
    if wrong:
        return f"{place or 'the receipt'}: {wrong}"
    if isinstance(value, dict):
        missing = [name for name in rule.get("required", ()) if name not in value]
        if missing:
            return f"{place or 'the receipt'}: {missing[0]} is missing"
        known, others = rule.get("properties", {}), rule.get("additionalProperties", {})
        parts = ((f"{place}.{name[:100]}".lstrip("."), each, known.get(name, others)) for name, each in value.items())
    elif isinstance(value, list):
        parts = ((f"{place}[{index}]", each, rule.get("items", {})) for index, each in enumerate(value))
    else:
        return None
    return next((found for where, each, of in parts if (found := fault(each, of, where))), None)


def _simple_fault(value: Any, rule: Mapping[str, Any]) -> str | None:
    """What is wrong with ``value`` itself, whatever it contains."""
    allowed = rule.get("type", list(_TYPES))
    allowed = [allowed] if isinstance(allowed, str) else allowed
    kinds = tuple(kind for name in allowed for kind in _TYPES[name])
    if not isinstance(value, kinds) or (isinstance(value, bool) and "boolean" not in allowed):
        return f"is {_shown(value)}, must be {' or '.join(allowed)}"
    if "const" in rule and (value != rule["const"] or isinstance(value, bool)):
        return f"is {_shown(value)}, must be {_shown(rule['const'])}"
    if "enum" in rule and value not in rule["enum"]:
        return f"is {_shown(value)}, must be one of {', '.join(rule['enum'])}"
    if isinstance(value, str) and not re.search(rule.get("pattern", ""), value):
        return f"is {_shown(value)}, must match {rule['pattern']}"
    size = len(value) if isinstance(value, (str, list, dict)) else value
    for name, kind in (("maximum", (int, float)), ("maxItems", list), ("maxLength", str), ("maxProperties", dict)):
        if name in rule and isinstance(value, kind) and size > rule[name]:
            return f"is {_shown(size)}, at most {rule[name]}"
    for name, kind in (("minimum", (int, float)), ("minItems", list)):
        if name in rule and isinstance(value, kind) and size < rule[name]:
            return f"is {_shown(size)}, at least {rule[name]}"
    return None


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return quoted(value) if isinstance(value, str) else json.dumps(value)
