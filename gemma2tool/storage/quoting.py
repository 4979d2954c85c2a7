"""Making text from untrusted files safe to show in a one-line message."""

from __future__ import annotations

import os
from typing import AnyStr

from gemma2tool.errors import escaped


def quoted(value: object, limit: int = 120) -> str:
    """Returns ``repr(value)``, escaped, with the middle cut out if it is longer than ``limit`` characters."""
    value = _ends(value, limit) if isinstance(value, str) else value
    value = _ends(value, limit) if isinstance(value, bytes) else value
    try:
        text = repr(value) if isinstance(value, str) and value.isprintable() else ascii(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deeply to be shown"
    if len(text) <= limit:
        return text
    return f"{text[: limit - 20]}...{text[-16:]}"


def _ends(text: AnyStr, limit: int) -> AnyStr:
    """The first and last ``limit`` characters of a text that is longer, so that no more than those are escaped."""
    return text if len(text) <= 2 * limit else text[:limit] + text[-limit:]


def one_line(text: object) -> str:
    """Returns ``str(text)`` on one line, escaped by ``errors.escaped``."""
    return escaped(str(text))


def inert(text: str) -> str:
    """A line of text in which GitHub's runner, where it runs this, finds no command: it reads those that begin with
    "::" at the beginning of a line, and those that begin with "##[" anywhere.
    """
    if os.environ.get("GITHUB_ACTIONS") != "true":
        return text
    start = len(text) - len(text.lstrip())
    text = f"{text[:start]}\\x3a{text[start + 1 :]}" if text.startswith("::", start) else text
    return text.replace("##[", "##\\x5b")
