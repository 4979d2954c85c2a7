"""What a command that fails leaves behind besides its message: reports that say so, annotations for GitHub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gemma2tool.errors import ToolError
from gemma2tool.verify.reports.annotations import annotate

_SUBJECTS = ("candidates", "src", "path", "output", "checkpoint", "a")
_OWN = ("report.", "output.is-input")
"""Errors of the reports themselves, after which nothing is written to them."""


def report_failure(command: str, options: Mapping[str, Any], error: tuple[str, str, str, int]) -> None:
    """Write the reports that ``options`` names, if any. ``error``: id, message, hint, exit code."""
    id, message, hint, exit_code = error
    subject = next((options[name] for name in _SUBJECTS if options.get(name)), "")
    subject = ", ".join(map(str, subject)) if isinstance(subject, list) else str(subject)
    annotate(subject, id, message)
    files = {name: options.get(name) for name in ("junit", "summary", "html") if options.get(name)}
    if not files or id.startswith(_OWN):
        return
    from gemma2tool import api

    with suppress(ToolError, OSError):  # the failure itself has been shown
        api.ReportFiles(**files).write_failure(api.Failure(command, subject, id, message, hint, exit_code))


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
