"""What a command that fails leaves behind besides its message: reports that say so, annotations for GitHub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gemma2tool.errors import ToolError
from gemma2tool.storage.paths import workspace_path

ANNOTATIONS = "GEMMA2TOOL_ANNOTATIONS"
"""Names a file that annotations are appended to; scripts/action.sh prints it, because GitHub's runner must not read
commands in what the tool itself prints."""

_SUBJECTS = ("candidate", "src", "path", "output", "checkpoint", "a")
_OWN = ("report.", "output.is-input")
"""Errors of the reports themselves, after which nothing is written to them."""


def report_failure(command: str, options: Mapping[str, Any], error: tuple[str, str, str, int]) -> None:
    """Write the reports that ``options`` names, if any. ``error``: id, message, hint, exit code."""
    id, message, hint, exit_code = error
    subject = next((workspace_path(options[name]) for name in _SUBJECTS if options.get(name)), "")
    annotate(subject, id, message)
    files = {name: options.get(name) for name in ("junit", "summary", "html") if options.get(name)}
    if not files or id.startswith(_OWN):
        return
    from gemma2tool.pipeline.report_files import ReportFiles
    from gemma2tool.verify.reports.failure import Failure

    with suppress(ToolError, OSError):  # the failure itself has been shown
        ReportFiles(**files).write_failure(Failure(command, subject, id, message, hint, exit_code))


def options_of(words: Sequence[str]) -> dict[str, Any]:
    """The reports that a command line names, where the command itself could not read it."""
    options: dict[str, Any] = {}
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in ("--junit", "--summary", "--html"):
            value = value if equals else next(iter(words[place + 1 : place + 2]), "")
            if value:
                options[name.removeprefix("--")] = Path(value)
    return options


def annotate(file: str, title: str, message: str) -> None:
    """Append an ``::error`` line, if a file for annotations is named."""
    place = os.environ.get(ANNOTATIONS)
    if not place:
        return
    where = f"file={_escaped(file, True)}," if file else ""
    with suppress(OSError), open(place, "a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(f"::error {where}title={_escaped(f'gemma2tool: {title}', True)}::{_escaped(message, False)}\n")


def _escaped(text: str, is_property: bool) -> str:
    """As GitHub's runner unescapes it; ``##[`` would be a command of its own."""
    text = text.replace("##[", "## [")
    special = r"[%\r\n:,]" if is_property else r"[%\r\n]"
    return re.sub(special, lambda match: f"%{ord(match[0]):02X}", text)
