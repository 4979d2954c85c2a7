"""SentencePiece's model file (``tokenizer.model``): a protocol-buffer message, bounded before anything is made of it.

Field numbers: sentencepiece_model.proto. ``check`` is for those who hand the file to the library.
"""

from __future__ import annotations

from collections.abc import Iterator

from gemma2tool.errors import InputRefused

PIECES, TRAINER, NORMALIZER, SELF_TEST, DENORMALIZER = 1, 2, 3, 4, 5
MAX_BYTES = 64 << 20
"""Gemma's has four million."""
MAX_PIECES = 1_000_000
MAX_PIECE_BYTES = 1 << 16
MAX_MESSAGE_BYTES = 16 << 20
"""Of the settings; a normalizer's table of characters may be large."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def check(data: bytes, where: str = "tokenizer.model") -> None:
    """Raises InputRefused (``sentencepiece.damaged``) unless ``data`` is such a message within the limits above, all its pieces UTF-8."""
    try:
        for number, value in messages(data):
            for inner, text in fields(value) if number <= DENORMALIZER else ():
                if number == PIECES and inner == 1 and isinstance(text, bytes):
                    text.decode("utf-8")
    except ValueError as error:
        raise damaged(where, str(error)) from error


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(field number, message) of the file's parts. ValueError for what is none, or more or larger than it should be."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes; at most {MAX_BYTES} are accepted")
    # A piece begins with a newline, its text with another: that many of them can be seen at a glance.
    pieces = 0
    if data.count(b"\n") > 4 * MAX_PIECES:
        raise ValueError(f"more than {MAX_PIECES} pieces")
    for number, value in fields(data):
        if not isinstance(value, bytes):
            continue
        pieces += number == PIECES
        if pieces > MAX_PIECES:
            raise ValueError(f"more than {MAX_PIECES} pieces")
        if len(value) > (MAX_PIECE_BYTES if number == PIECES else MAX_MESSAGE_BYTES):
            raise ValueError(f"a part of {len(value)} bytes")
        yield number, value


def damaged(where: str, what: str) -> InputRefused:
    return InputRefused(
        "sentencepiece.damaged",
        f"{where}: not a SentencePiece model: {what}",
        hint="fetch the tokenizer again (a Git LFS pointer is a common cause)",
    )


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: an int for varints, bytes for the other kinds. ValueError for what is none."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _LENGTH:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if size > end - at:
            raise ValueError(f"a field of {size} bytes at byte {at} of {end}")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"a number is cut at byte {at}")
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
        shift += 7
