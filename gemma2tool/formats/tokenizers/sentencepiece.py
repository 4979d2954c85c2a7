"""The SentencePiece model file (``tokenizer.model``): a protocol-buffer message, read and written here without the library.

The library hides which pieces are USER_DEFINED, and its message classes need another package. Field numbers are those of
sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from gemma2tool.containers.tokenizer_model import NORMALIZER, PIECES, TRAINER, damaged, fields, messages

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces; GGUF's token types have the same numbers."""

SPACE = "\u2581"
_VARINT, _LENGTH, _FIXED32 = 0, 2, 5


@dataclass(frozen=True)
class Piece:
    """One line of the vocabulary; its id is its place. ``score`` is a float32 whose sign bit counts even at zero."""

    text: str
    score: float = 0.0
    type: int = NORMAL


@dataclass(frozen=True)
class SentencePieceModel:
    """``pieces`` in the order of their ids; ``trainer`` and ``normalizer`` map field numbers to their last value."""

    pieces: tuple[Piece, ...]
    trainer: Mapping[int, int | bytes] = field(default_factory=dict)
    normalizer: Mapping[int, int | bytes] = field(default_factory=dict)


def parse(data: bytes, where: str = "tokenizer.model") -> SentencePieceModel:
    """The vocabulary of a model file. Raises ``InputRefused`` (``sentencepiece.damaged``) for anything but such a message."""
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
        raise damaged(where, str(error)) from error
    if not pieces:
        raise damaged(where, "no pieces in it")
    return SentencePieceModel(tuple(pieces), trainer, normalizer)


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)


# -- writing ---------------------------------------------------------------------------------------------------------------

# TrainerSpec
_MODEL_TYPE, _VOCAB_SIZE, _SPLIT_DIGITS, _WHITESPACE_PIECES, _BYTE_FALLBACK = 3, 4, 25, 26, 35
_UNK_ID, _BOS_ID, _EOS_ID, _PAD_ID = 40, 41, 42, 43
_UNK_PIECE, _BOS_PIECE, _EOS_PIECE, _PAD_PIECE = 45, 46, 47, 48
_BPE = 2
# NormalizerSpec
_NAME, _CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 1, 2, 3, 4, 5


def gemma_model(pieces: tuple[Piece, ...], special: Mapping[str, int]) -> bytes:
    """A model file with Gemma's settings: BPE with byte fallback, digits split, text neither normalized nor prefixed with a space.

    ``special`` has the ids of ``unk``, ``bos``, ``eos`` and ``pad``, or -1.
    """
    trainer = _number(_MODEL_TYPE, _BPE) + _number(_VOCAB_SIZE, len(pieces))
    trainer += _number(_SPLIT_DIGITS, 1) + _number(_WHITESPACE_PIECES, 1) + _number(_BYTE_FALLBACK, 1)
    ids = {"unk": _UNK_ID, "bos": _BOS_ID, "eos": _EOS_ID, "pad": _PAD_ID}
    texts = {"unk": _UNK_PIECE, "bos": _BOS_PIECE, "eos": _EOS_PIECE, "pad": _PAD_PIECE}
    for name, number in ids.items():
        trainer += _number(number, special.get(name, -1))
    for name, number in texts.items():
        if special.get(name, -1) >= 0:
            trainer += _bytes(number, pieces[special[name]].text.encode())
    normalizer = _bytes(_NAME, b"identity") + _bytes(_CHARSMAP, b"")
    normalizer += _number(_DUMMY_PREFIX, 0) + _number(_REMOVE_SPACES, 0) + _number(_ESCAPE_SPACES, 1)
    out = bytearray()
    for piece in pieces:
        body = _bytes(1, piece.text.encode()) + bytes([2 << 3 | _FIXED32]) + struct.pack("<f", piece.score)
        out += _bytes(1, body if piece.type == NORMAL else body + _number(3, piece.type))
    return bytes(out) + _bytes(2, trainer) + _bytes(3, normalizer)


def _number(field_number: int, value: int) -> bytes:
    return _encoded_varint(field_number << 3 | _VARINT) + _encoded_varint(value % (1 << 64))


def _bytes(field_number: int, value: bytes) -> bytes:
    return _encoded_varint(field_number << 3 | _LENGTH) + _encoded_varint(len(value)) + value


def _encoded_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
