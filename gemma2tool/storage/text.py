"""Texts that a user gives to be read by the model."""

from __future__ import annotations

import os

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.storage.reading import read_whole

MAX_BYTES = 1 << 30


def read_text(path: str | os.PathLike[str], *, what: str) -> str:
    """The text of a file in UTF-8, without a byte order mark; ``what`` names it in messages ("calibration text").

    Raises InputRefused ``text.encoding`` for bytes that are no UTF-8 and ``text.binary`` for NULs, which UTF-8 allows but no text
    holds; UsageError ``text.empty`` for an empty file.
    """
    data = read_whole(path, what=what, max_bytes=MAX_BYTES)
    hint = "give plain text, saved as UTF-8"
    at = data.find(b"\0")
    if at >= 0:
        raise InputRefused("text.binary", f"{path}: not text: byte {at} is NUL", hint=hint)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputRefused("text.encoding", f"{path}: not UTF-8 text (byte {error.start})", hint=hint) from None
    if not text:
        raise UsageError("text.empty", f"{path}: is empty", hint="give a file with text in it")
    return text
