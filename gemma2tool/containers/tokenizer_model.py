"""SentencePiece's model file (``tokenizer.model``): a protocol-buffer message, parsed within limits and written.

Parsed without the sentencepiece library, which hides which pieces are USER_DEFINED and whose message classes need
another package. Field numbers are from sentencepiece_model.proto. Call ``check`` before passing a file to the library.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from gemma2tool.containers import file_kind
from gemma2tool.errors import InputRefused

PIECES, TRAINER, NORMALIZER, SELF_TEST, DENORMALIZER = 1, 2, 3, 4, 5
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces; GGUF's token types have the same numbers."""

SPACE = "\u2581"
"""What SentencePiece writes for a space."""

MAX_BYTES = 64 << 20
"""Gemma's file has four million."""
MAX_PIECES = 1_000_000
MAX_PIECE_BYTES = 1 << 16
MAX_MESSAGE_BYTES = 16 << 20
"""For a message of settings. A normalizer's character table may be large."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5

# TrainerSpec
_MODEL_TYPE, _VOCAB_SIZE, _SPLIT_DIGITS, _WHITESPACE_PIECES, _BYTE_FALLBACK = 3, 4, 25, 26, 35
_UNK_ID, _BOS_ID, _EOS_ID, _PAD_ID = 40, 41, 42, 43
_UNK_PIECE, _BOS_PIECE, _EOS_PIECE, _PAD_PIECE = 45, 46, 47, 48
_BPE = 2
_SPECIAL_PIECES = {
    "unk": (_UNK_PIECE, b"<unk>", UNKNOWN),
    "bos": (_BOS_PIECE, b"<s>", CONTROL),
    "eos": (_EOS_PIECE, b"</s>", CONTROL),
    "pad": (_PAD_PIECE, b"<pad>", CONTROL),
}
"""Role -> the field that names its piece, the field's default, and the type of such a piece."""
# NormalizerSpec
_NAME, _CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 1, 2, 3, 4, 5


class Piece(NamedTuple):
    """One entry of the vocabulary; its id is its position. ``score`` is a float32 whose sign bit
    counts even at zero.
    """

    text: str
    score: float = 0.0
    type: int = NORMAL


@dataclass(frozen=True)
class NormalizerSpec:
    """What is done to a text before it is cut into pieces; the defaults are Gemma's, not those of the proto file."""

    add_dummy_prefix: bool = False
    remove_extra_whitespaces: bool = False
    escape_whitespaces: bool = True
    charsmap: bytes = b""


@dataclass(frozen=True)
class SentencePieceModel:
    """``pieces`` in the order of their ids; ``trainer`` and ``normalizer`` map field numbers to their last value."""

    pieces: tuple[Piece, ...]
    trainer: Mapping[int, int | bytes] = field(default_factory=dict)
    normalizer: Mapping[int, int | bytes] = field(default_factory=dict)

    @property
    def normalizer_spec(self) -> NormalizerSpec:
        """The normalizer's settings; fields that are absent have the proto file's defaults."""
        charsmap = self.normalizer.get(_CHARSMAP, b"")
        return NormalizerSpec(
            bool(self.normalizer.get(_DUMMY_PREFIX, 1)),
            bool(self.normalizer.get(_REMOVE_SPACES, 1)),
            bool(self.normalizer.get(_ESCAPE_SPACES, 1)),
            charsmap if isinstance(charsmap, bytes) else b"",
        )

    def special_ids(self) -> dict[str, int]:
        """The ids of ``unk``, ``bos``, ``eos`` and ``pad`` as the sentencepiece library reports them: those of the
        pieces that the trainer's settings name, -1 for a piece that does not exist or has another type.
        """
        places = {piece.text: (token, piece.type) for token, piece in reversed(list(enumerate(self.pieces)))}
        ids = {}
        for role, (number, default, type) in _SPECIAL_PIECES.items():
            text = self.trainer.get(number, default)
            token, token_type = places.get(
                text.decode("utf-8", "replace") if isinstance(text, bytes) else "", (-1, type)
            )
            ids[role] = token if token_type == type else -1
        return ids


# -- reading -----------------------------------------------------------------------------------------------------------


def check(data: bytes, where: str = "tokenizer.model") -> None:
    """Raises InputRefused (``sentencepiece.damaged``) unless ``data`` is a model file within the limits above whose
    pieces are all UTF-8.
    """
    try:
        for number, value in messages(data):
            for inner, text in fields(value) if number <= DENORMALIZER else ():
                if number == PIECES and inner == 1 and isinstance(text, bytes):
                    text.decode("utf-8")
    except ValueError as error:
        raise _refusal(data, where, str(error)) from error


def parse(data: bytes, where: str = "tokenizer.model") -> SentencePieceModel:
    """The contents of a model file. Raises ``InputRefused`` (``sentencepiece.damaged``) for anything else."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in messages(data):
            if number == PIECES:
                pieces.append(_piece(value))
            elif number == TRAINER:
                trainer.update(fields(value))
            elif number == NORMALIZER:
                normalizer.update(fields(value))
    except (ValueError, struct.error) as error:
        raise _refusal(data, where, str(error)) from error
    if not pieces:
        raise _refusal(data, where, "it has no pieces")
    return SentencePieceModel(tuple(pieces), trainer, normalizer)


def _piece(data: bytes) -> Piece:
    text, score, type = "", 0.0, NORMAL
    for number, value in fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            type = value
    return Piece(text, score, type)


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(field number, message) of the file's parts.

    Raises ValueError for data that is not a protocol-buffer message, and for more or larger parts than the limits
    allow.
    """
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


def _refusal(data: bytes, where: str, what: str) -> InputRefused:
    """The error for ``data`` that is not a model file: what it is, if that can be seen, else what is damaged."""
    kind = file_kind.identify(data[: file_kind.HEAD_BYTES], len(data))
    return damaged(where, what) if kind is None else file_kind.foreign(kind, where)


def damaged(where: str, what: str) -> InputRefused:
    return InputRefused("sentencepiece.damaged", f"{where}: not a SentencePiece model: {what}")


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: an int for varints, bytes for the other kinds. Raises
    ValueError for others.
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


# -- writing -----------------------------------------------------------------------------------------------------------


def encode(
    pieces: Iterable[Piece],
    special: Mapping[str, int],
    normalizer: NormalizerSpec = NormalizerSpec(),
    *,
    byte_fallback: bool = True,
) -> bytes:
    """A model file with Gemma's settings: BPE, digits split, byte fallback, and the ``normalizer`` given.

    ``special`` has the ids of ``unk``, ``bos``, ``eos`` and ``pad``; an absent one is written as -1.
    """
    pieces = tuple(pieces)
    trainer = _number(_MODEL_TYPE, _BPE) + _number(_VOCAB_SIZE, len(pieces))
    trainer += _number(_SPLIT_DIGITS, 1) + _number(_WHITESPACE_PIECES, 1) + _number(_BYTE_FALLBACK, int(byte_fallback))
    ids = {"unk": _UNK_ID, "bos": _BOS_ID, "eos": _EOS_ID, "pad": _PAD_ID}
    texts = {"unk": _UNK_PIECE, "bos": _BOS_PIECE, "eos": _EOS_PIECE, "pad": _PAD_PIECE}
    for name, number in ids.items():
        trainer += _number(number, special.get(name, -1))
    for name, number in texts.items():
        if special.get(name, -1) >= 0:
            trainer += _bytes(number, pieces[special[name]].text.encode())
    settings = _bytes(_NAME, b"identity") + _bytes(_CHARSMAP, normalizer.charsmap)
    settings += _number(_DUMMY_PREFIX, int(normalizer.add_dummy_prefix))
    settings += _number(_REMOVE_SPACES, int(normalizer.remove_extra_whitespaces))
    settings += _number(_ESCAPE_SPACES, int(normalizer.escape_whitespaces))
    out = bytearray()
    for piece in pieces:
        body = _bytes(1, piece.text.encode()) + _SCORE_TAG + struct.pack("<f", piece.score)
        out += _bytes(1, body if piece.type == NORMAL else body + _number(3, piece.type))
    return bytes(out) + _bytes(2, trainer) + _bytes(3, settings)


def _number(field_number: int, value: int) -> bytes:
    return _encoded_varint(field_number << 3 | _VARINT) + _encoded_varint(value % (1 << 64))


def _bytes(field_number: int, value: bytes) -> bytes:
    return _encoded_varint(field_number << 3 | _LENGTH) + _encoded_varint(len(value)) + value


_SCORE_TAG = bytes([2 << 3 | _FIXED32])
_ONE_BYTE = tuple(bytes([value]) for value in range(0x80))


def _encoded_varint(value: int) -> bytes:
    if value < 0x80:  # nearly all of them, and a vocabulary has a million
        return _ONE_BYTE[value]
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
