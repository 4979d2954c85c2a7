"""Reading text files that the user names: calibration and evaluation text."""

from __future__ import annotations

import os

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.storage.reading import read_whole

MAX_BYTES = 1 << 30


def read_text(path: str | os.PathLike[str], *, what: str) -> str:
    """Returns the text of a UTF-8 file, without its byte order mark.

    ``what`` names it in messages ("calibration text").

    Raises InputRefused ``text.encoding`` if the bytes are not UTF-8 and ``text.binary`` if they contain a NUL, which
    UTF-8 allows but text does not contain; UsageError ``text.empty`` for an empty file.
    """
    data = read_whole(path, what=what, max_bytes=MAX_BYTES)
    hint = "give plain text, saved as UTF-8"
    nul = data.find(b"\0")
    if nul >= 0:
        raise InputRefused("text.binary", f"{path}: not text: byte {nul} is NUL", hint=hint)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputRefused("text.encoding", f"{path}: not UTF-8 text (byte {error.start})", hint=hint) from None
    if not text:
        raise UsageError("text.empty", f"{path}: is empty", hint="pass a file that contains text")
    return text
