"""SentencePiece's model file (``tokenizer.model``): a protocol-buffer message, checked against limits before it is
used.

Field numbers are from sentencepiece_model.proto. Call ``check`` before passing a file to the sentencepiece library.
"""

from __future__ import annotations

from collections.abc import Iterator

from gemma2tool.errors import InputRefused

PIECES, TRAINER, NORMALIZER, SELF_TEST, DENORMALIZER = 1, 2, 3, 4, 5
MAX_BYTES = 64 << 20
"""Gemma's file has four million."""
MAX_PIECES = 1_000_000
MAX_PIECE_BYTES = 1 << 16
MAX_MESSAGE_BYTES = 16 << 20
"""For a message of settings. A normalizer's character table may be large."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def check(data: bytes, where: str = "tokenizer.model") -> None:
    """Raises InputRefused (``sentencepiece.damaged``) unless ``data`` is valid, within the limits and in UTF-8."""
    try:
        for number, value in messages(data):
            for inner, text in fields(value) if number <= DENORMALIZER else ():
                if number == PIECES and inner == 1 and isinstance(text, bytes):
                    text.decode("utf-8")
    except ValueError as error:
        raise damaged(where, str(error)) from error


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields (field number, message) for each part of the file. ValueError if invalid or too large."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes; at most {MAX_BYTES} are accepted")
    # A quick upper bound: a piece and its text each begin with a newline byte (their protobuf tags).
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
            raise ValueError(f"a part has {len(value)} bytes")
        yield number, value


def damaged(where: str, what: str) -> InputRefused:
    return InputRefused("sentencepiece.damaged", f"{where}: not a SentencePiece model: {what}")


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (field number, value) for each field of a message: an int for a varint, bytes otherwise.

    Raises ValueError.
    """
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
            raise ValueError(f"a field of {size} bytes starts at byte {at} of {end}")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"a number is truncated at byte {at}")
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
        shift += 7
