"""``python -m gemma2tool.errors`` prints docs/errors.md, made from the table."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from gemma2tool.errors.codes import EXIT_CODES
from gemma2tool.errors.table import AREAS

_HEAD = """\
# Errors

<!-- Made by `python -m gemma2tool.errors > docs/errors.md`. Edit gemma2tool/errors/table/ instead. -->

Every failure that gemma2tool foresees is printed on stderr as `error[id]: message` and `hint: what to do`. With
`--json`, `{"error": {"id", "message", "hint", "exit_code"}}` is also printed on stdout. In Python a failure is an
exception, a `gemma2tool.errors.ToolError` with the attributes `id`, `message`, `hint` and `exit_code`. Ids and exit
codes are stable; messages and hints are not. An error's own hint is often more specific than the one below.
"""


def document() -> str:
    """The text of docs/errors.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield _HEAD
    yield "| exit code | meaning |"
    yield "|---:|---|"
    for code, meaning in EXIT_CODES.items():
        yield f"| {code} | {meaning} |"
    for area, entries in AREAS.items():
        yield f"\n## {area}\n"
        yield "| id | exit code | meaning | what to do |"
        yield "|---|---:|---|---|"
        for entry in sorted(entries, key=lambda entry: entry.id):
            yield f"| `{entry.id}` | {entry.exit_code} | {_cell(entry.meaning)} | {_cell(entry.remedy)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.stdout.write(document())
