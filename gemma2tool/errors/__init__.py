"""Errors a user can act on.

Every failure that gemma2tool foresees is a ``ToolError``: one line that says what is wrong and where, a stable id that
scripts can match, a hint that says what to do, and the exit code of the command line. Any other exception that escapes
is a bug. The ids are listed in ``gemma2tool.errors.table``.
"""

from __future__ import annotations

from gemma2tool.errors.codes import (
    EXIT_BUG,
    EXIT_INPUT_REFUSED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_RESOURCES,
    EXIT_USAGE,
    EXIT_VERIFICATION_FAILED,
)

__all__ = [
    "EXIT_BUG",
    "EXIT_INPUT_REFUSED",
    "EXIT_INTERRUPTED",
    "EXIT_OK",
    "EXIT_RESOURCES",
    "EXIT_USAGE",
    "EXIT_VERIFICATION_FAILED",
    "InputRefused",
    "ResourceError",
    "ToolError",
    "UsageError",
    "escaped",
    "renamed",
    "stand_ins",
]

_MAX_MESSAGE = 2000

stand_ins: dict[str, str] = {}
"""Local paths that stand for something else, and what people know that by: messages name the latter."""


def renamed(text: str) -> str:
    """``text`` with the addresses of what its local paths stand for."""
    for path, address in list(stand_ins.items()):
        text = text.replace(path, address)
    return text


def escaped(text: str) -> str:
    """``text`` on one line, with every invisible character written as an escape.

    Control characters (ANSI sequences and line breaks among them), right-to-left overrides and lone surrogates become
    ``\\x1b``, ``\\n``, ``\\u202e`` and so on.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _bounded(text: str) -> str:
    """``text`` without its middle if it is long: a message may quote a file, and a quotation may be megabytes."""
    return text if len(text) <= _MAX_MESSAGE else f"{text[: _MAX_MESSAGE // 2]} ... {text[-_MAX_MESSAGE // 4 :]}"


def _remedy(id: str) -> str:
    """What the table says to do about ``id``; empty for an id that it does not list."""
    from gemma2tool.errors.table import TABLE

    return TABLE[id].remedy if id in TABLE else ""


class ToolError(Exception):
    """A foreseen failure.

    ``id`` is a dotted, stable name such as ``safetensors.overlap``. ``message`` is one line that says what is wrong and
    where. ``hint`` is one line that says what to do; without one, it is the remedy of ``id`` in the table. Text
    quoted from files is escaped and shortened here, so that callers need not do it.
    """

    exit_code = EXIT_BUG

    def __init__(self, id: str, message: str, *, hint: str = "") -> None:
        message = escaped(_bounded(renamed(message)))
        super().__init__(message)
        self.id = id
        self.message = message
        self.hint = escaped(_bounded(renamed(hint or _remedy(id))))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.id, self.message, self.hint)


def _rebuild(error_class: type[ToolError], id: str, message: str, hint: str) -> ToolError:
    return error_class(id, message, hint=hint)


class UsageError(ToolError):
    """The command or call cannot work as it was made."""

    exit_code = EXIT_USAGE


class InputRefused(ToolError):
    """An input file is damaged, hostile, incomplete or not a Gemma 2 checkpoint."""

    exit_code = EXIT_INPUT_REFUSED


class ResourceError(ToolError):
    """The machine lacks something: disk space, memory, a lock, a writable folder, a device."""

    exit_code = EXIT_RESOURCES
