"""Making text from untrusted files safe to show in a one-line message."""

from __future__ import annotations

from gemma2tool.errors import escaped


def quoted(value: object, limit: int = 120) -> str:
    """Returns ``repr(value)`` with control characters and newlines escaped, and the middle cut out beyond ``limit`` characters."""
    if isinstance(value, str) and len(value) > 2 * limit:
        value = value[:limit] + value[-limit:]
    elif isinstance(value, bytes) and len(value) > 2 * limit:
        value = value[:limit] + value[-limit:]
    try:
        text = repr(value) if isinstance(value, str) and value.isprintable() else ascii(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deeply to be shown"
    if len(text) <= limit:
        return text
    return f"{text[: limit - 20]}...{text[-16:]}"


def one_line(text: object) -> str:
    """Returns ``str(text)`` on one line, escaped by ``errors.escaped``."""
    return escaped(str(text))
