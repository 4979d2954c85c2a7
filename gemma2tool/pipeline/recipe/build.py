"""From a recipe's values to the typed requests that the command line's options give."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma2tool.errors import ToolError, UsageError
from gemma2tool.formats.options import Adapter, WriteOptions
from gemma2tool.formats.options_budget import Budget
from gemma2tool.model.instruction_tuned import RELEASED
from gemma2tool.pipeline.opening import is_remote
from gemma2tool.pipeline.recipe.document import Run, Section, Value
from gemma2tool.pipeline.recipe.keys import OPTION_GROUPS
from gemma2tool.pipeline.report_files import ReportFiles
from gemma2tool.pipeline.requests import Checks, ConversionRequest, OutputRequest, RunOptions
from gemma2tool.sources.address import parse
from gemma2tool.sources.http import without_secrets
from gemma2tool.verify.gates import parse_gates

logger = logging.getLogger("gemma2tool")

Groups = dict[str, dict[str, Any]]


def request_of(run: Run, path: Path) -> ConversionRequest:
    """The request of a run of the recipe at ``path``, to whose folder its paths are relative.

    Raises ``UsageError`` for values that options refuse, with file, line and key.
    """
    shared = _groups(run.shared, path)
    outputs = tuple(_output(section, path) for section in run.outputs)
    asked = shared["request"]
    if "gate" in run.shared:
        gate = run.shared["gate"]
        shared["checks"]["gates"] = _of(gate, path, parse_gates, gate.content)
    unused = [value for value in run.shared.values() if value.key.group in ("checks", "reports")]
    if unused and not asked.get("verify", True):
        message = f"{path}:{unused[0].line}: {unused[0].key.name} has no effect with no-verify"
        raise UsageError("option.ignored", message, hint="leave out one of the two")
    return ConversionRequest(
        source=asked["source"],
        destination=outputs[0].destination,
        outputs=outputs,
        options=WriteOptions(adapters=tuple(asked.get("adapters", ()))),
        config=asked.get("config"),
        checks=Checks(**shared["checks"]) if asked.get("verify", True) else None,
        run=RunOptions(**shared["run"]),
        reports=ReportFiles(**shared["reports"]),
        budget=Budget(**_groups(run.outputs[0], path)["budget"]),
    )


def _output(section: Section, path: Path) -> OutputRequest:
    groups = _groups(section, path)
    options = WriteOptions(
        **groups["options"],
        **{name: group(**groups[name]) for name, group in OPTION_GROUPS.items() if name != "budget"},
    )
    types = ",".join(groups["output"].get("types", ())).lower().split(",")
    return OutputRequest(
        destination=groups["output"]["destination"],
        types=tuple(dict.fromkeys(name.strip() for name in types if name.strip())),
        to=groups["output"].get("to"),
        options=options,
    )


def _groups(section: Section, path: Path) -> Groups:
    """The values of a section as the fields of dataclasses, by the dataclass."""
    groups: Groups = defaultdict(dict)
    for value in section.values():
        content = _of(value, path, _converted, value, path.parent)
        groups[value.key.group][value.key.field] = not content if value.key.inverted else content
    return groups


def _of(value: Value, path: Path, convert: Callable[..., Any], *arguments: Any) -> Any:
    """``convert(*arguments)``, whose errors name the place of the value."""
    try:
        return convert(*arguments)
    except ToolError as error:
        raise UsageError(
            error.id, f"{path}:{value.line}: {value.key.name}: {error.message}", hint=error.hint
        ) from error


def _converted(value: Value, folder: Path) -> Any:
    key = value.key
    parts = value.content if key.repeated else (value.content,)
    if key.kind in ("file", "model"):
        parts = tuple(_adapter(part, folder) if key.name == "lora" else located(part, folder) for part in parts)
        if key.kind == "file":
            parts = tuple(Path(part) for part in parts)
    elif key.parse is not None:
        parts = tuple(key.parse(part) for part in parts)
    return parts if key.repeated else parts[0]


def located(text: str, folder: Path) -> str:
    """A path of a recipe in ``folder``; an address, a name on the hub and a released model's name as they are."""
    if parse(text) is not None or (folder / text).exists():
        return text if parse(text) is not None else str(folder / text)
    return text if text.lower() in RELEASED or is_remote(text) else str(folder / text)


def _adapter(text: str, folder: Path) -> Adapter:
    path, equals, scale = text.rpartition("=")
    if not equals or (folder / text).exists():
        return Adapter(Path(located(text, folder)))
    try:
        return Adapter(Path(located(path, folder)), float(scale))
    except ValueError:
        raise UsageError("option.lora", f"{scale!r} is not a number", hint="write FOLDER=0.5") from None


def as_run(shared: Section, section: Section, place: Callable[[str], str]) -> dict[str, Any]:
    """What a recipe says of one output, as one mapping that makes it again. ``place``: what a path is written as."""
    content: dict[str, Any] = {}
    for name, value in sorted({**shared, **section}.items(), key=lambda item: (item[0] != "source", item[0])):
        parts = value.content if value.key.repeated else (value.content,)
        if value.key.kind in ("file", "model"):
            parts = tuple(_written(part, place) for part in parts)
        content[name] = list(parts) if value.key.repeated else parts[0]
    return content


def _written(text: str, place: Callable[[str], str]) -> str:
    address = parse(text)
    if address is not None:
        return without_secrets(text) if text.startswith(("http:", "https:")) else text
    return text if text.lower() in RELEASED or is_remote(text) else place(text)
