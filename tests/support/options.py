"""Write options from plain keywords, as tests give them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from gemma2tool.formats.option_info import option_fields
from gemma2tool.formats.options import GGUFOptions, PackingOptions, SplitOptions, WriteOptions
from gemma2tool.formats.options_calibration import Calibration

_PLAIN = {field.name for field in fields(WriteOptions)} - {"split", "gguf", "packing", "calibration"}


def write_options(**given: Any) -> WriteOptions:
    """``given``: fields of ``WriteOptions`` and, by their names in receipts, those of its groups."""
    plain = {name: given.pop(name) for name in list(given) if name in _PLAIN}
    groups: dict[str, Any] = {}
    for name, kind in (
        ("split", SplitOptions),
        ("gguf", GGUFOptions),
        ("packing", PackingOptions),
        ("calibration", Calibration),
    ):
        groups[name] = kind(**_taken(kind, given))
    assert not given, given
    return WriteOptions(**plain, **groups)


def _taken(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    names = {info.key or field.name: field.name for field, info in option_fields(kind)}
    return {name: given.pop(key) for key, name in names.items() if key in given}
