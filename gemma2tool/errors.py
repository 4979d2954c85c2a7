"""Errors a user can act on.

Every failure the tool foresees is a ``ToolError``: one line that says what is wrong and where, a stable id that scripts can
match, a hint that says what to do, and the exit code that the command line documents. Anything else that escapes is a bug.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_VERIFICATION_FAILED = 1
EXIT_USAGE = 2
EXIT_INPUT_REFUSED = 3
EXIT_RESOURCES = 4
EXIT_BUG = 70
EXIT_INTERRUPTED = 130

_MAX_MESSAGE = 2000


def escaped(text: str) -> str:
    """``text`` on one line with every character that does not simply show itself written as an escape.

    Control characters (so ANSI sequences and line breaks), right-to-left overrides and other invisible characters, and
    lone surrogates become ``\\x1b``, ``\\n``, ``\\u202e`` and so on.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _bounded(text: str) -> str:
    """A message may quote what a file says, which may be megabytes."""
    return text if len(text) <= _MAX_MESSAGE else f"{text[: _MAX_MESSAGE // 2]} ... {text[-_MAX_MESSAGE // 4 :]}"


class ToolError(Exception):
    """A foreseen failure.

    ``id`` is a dotted, stable name such as ``safetensors.overlap``; ``message`` is one line that names the thing and the place;
    ``hint`` is one line that says what to do about it (may be empty). Whatever they quote from files is escaped and cut to a
    bearable length here, so that no output needs to remember it.
    """

    exit_code = EXIT_BUG

    def __init__(self, id: str, message: str, *, hint: str = "") -> None:
        message = escaped(_bounded(message))
        super().__init__(message)
        self.id = id
        self.message = message
        self.hint = escaped(_bounded(hint))

    def __reduce__(self):
        return _rebuild, (type(self), self.id, self.message, self.hint)


def _rebuild(kind: type[ToolError], id: str, message: str, hint: str) -> ToolError:
    return kind(id, message, hint=hint)


class VerificationFailed(ToolError):
    """The output was read and is not the model it should be."""

    exit_code = EXIT_VERIFICATION_FAILED


class UsageError(ToolError):
    """The command was called in a way that cannot work."""

    exit_code = EXIT_USAGE


class InputRefused(ToolError):
    """An input file is broken, hostile, incomplete or not a Gemma 2 checkpoint."""

    exit_code = EXIT_INPUT_REFUSED


class ResourceError(ToolError):
    """The machine would not give what the work needs: disk space, memory, a lock, a writable folder."""

    exit_code = EXIT_RESOURCES
