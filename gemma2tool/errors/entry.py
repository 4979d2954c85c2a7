"""One row of the table of errors."""

from __future__ import annotations

from dataclasses import dataclass

from gemma2tool.errors.codes import EXIT_INPUT_REFUSED, EXIT_RESOURCES, EXIT_USAGE


@dataclass(frozen=True)
class Entry:
    """What an error id means. ``remedy`` is the hint of an error that is raised without one."""

    id: str
    exit_code: int
    meaning: str
    remedy: str


def usage(id: str, meaning: str, remedy: str) -> Entry:
    """An entry of a ``UsageError``."""
    return Entry(id, EXIT_USAGE, meaning, remedy)


def refused(id: str, meaning: str, remedy: str) -> Entry:
    """An entry of an ``InputRefused``."""
    return Entry(id, EXIT_INPUT_REFUSED, meaning, remedy)


def resource(id: str, meaning: str, remedy: str) -> Entry:
    """An entry of a ``ResourceError``."""
    return Entry(id, EXIT_RESOURCES, meaning, remedy)
