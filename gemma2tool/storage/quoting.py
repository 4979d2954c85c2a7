"""Text from untrusted files, made fit for one line of a message."""

from __future__ import annotations

from gemma2tool.errors import escaped


def quoted(text: object, limit: int = 120) -> str:
    """``repr`` of ``text``, which escapes control characters and newlines, with the middle cut out beyond ``limit`` characters."""
    if isinstance(text, (str, bytes)) and len(text) > 2 * limit:
        text = text[:limit] + text[-limit:]
    try:
        shown = repr(text) if isinstance(text, str) and text.isprintable() else ascii(text)
    except RecursionError:
        shown = f"a {type(text).__name__} that nests too deeply to be shown"
    if len(shown) <= limit:
        return shown
    return f"{shown[: limit - 20]}...{shown[-16:]}"


def safe(text: object) -> str:
    """``text`` on one line, as ``errors.escaped`` makes it."""
    return escaped(str(text))
