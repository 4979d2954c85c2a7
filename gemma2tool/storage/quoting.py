"""Text from untrusted files, made fit for one line of a message."""

from __future__ import annotations


def quoted(text: object, limit: int = 120) -> str:
    """``repr`` of ``text``, which escapes control characters and newlines, with the middle cut out beyond ``limit`` characters."""
    if isinstance(text, (str, bytes)) and len(text) > 2 * limit:
        text = text[:limit] + text[-limit:]
    shown = ascii(text) if not isinstance(text, str) or not text.isprintable() else repr(text)
    if len(shown) <= limit:
        return shown
    return f"{shown[: limit - 20]}...{shown[-16:]}"


def safe(text: object) -> str:
    """``text`` on one line with every character that does not simply show itself written as an escape.

    Control characters (so ANSI sequences and line breaks), right-to-left overrides and other invisible characters, and
    lone surrogates become ``\\x1b``, ``\\n``, ``\\u202e`` and so on.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in str(text))
