"""Write docs/recipe.schema.json, the JSON schema of recipes, from the table of keys and the command line's help.

python scripts/recipe_schema.py            # rewrite it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from gemma2tool.cli.main import app
from gemma2tool.formats import catalog
from gemma2tool.pipeline.recipe.keys import KEYS, OUTPUT, OUTPUTS, RUNS, SOURCE, Key

PATH = Path(__file__).resolve().parent.parent / "docs" / "recipe.schema.json"
_TYPES = {"flag": "boolean", "integer": "integer", "number": "number"}
_OWN = {SOURCE: "SRC", OUTPUT: "DST"}


def helps() -> dict[str, str]:
    """The help of each option of convert and quantize, by its name without dashes; of the arguments, by their names."""
    commands: Any = typer.main.get_command(app)
    helps: dict[str, str] = {}
    for name in ("convert", "quantize"):
        for param in commands.commands[name].params:
            key = param.metavar if param.param_type_name == "argument" else param.opts[0].removeprefix("--")
            helps[key] = param.help
    return helps


def text() -> str:
    """The schema as the text of its file."""
    described = helps()
    properties = {name: _property(key, described[_OWN.get(name, name)]) for name, key in KEYS.items()}
    of_output = {name: {"$ref": f"#/$defs/{name}"} for name, key in KEYS.items() if key.of_output}
    of_run = {
        **{name: {"$ref": f"#/$defs/{name}"} for name in KEYS},
        OUTPUTS: {
            "description": "Several outputs of the source, in one pass. Keys beside it hold for all of them.",
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "properties": of_output, "required": [OUTPUT], "additionalProperties": False},
        },
    }
    runs = {
        "description": "Several sources. Keys beside it hold for all of them.",
        "type": "array",
        "minItems": 1,
        "items": {"type": "object", "properties": of_run, "additionalProperties": False},
    }
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "gemma2tool recipe",
        "type": "object",
        "properties": {**of_run, RUNS: runs},
        "additionalProperties": False,
        "$defs": properties,
    }
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _property(key: Key, help: str) -> dict[str, Any]:
    value: dict[str, Any] = {"type": _TYPES.get(key.kind, "string")}
    if key.parse is not None and not key.repeated:
        value = {"type": ["string", "number"]}  # as in "memory: 500000000"
    if key.choices:
        value = {"enum": [int(choice) if key.kind == "integer" else choice for choice in key.choices]}
    value |= {"minimum": key.minimum} if key.minimum is not None else {}
    value |= {"maximum": key.maximum} if key.maximum is not None else {}
    if key.name == "type":
        value |= {"examples": sorted({name for entry in catalog.format_entries() for name in entry.types})}
    if key.repeated:
        value = {"anyOf": [value, {"type": "array", "items": value}]}
    return {"description": help, **value}


if __name__ == "__main__":
    PATH.write_text(text(), "utf-8")
