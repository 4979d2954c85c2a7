"""gemma.cpp's ``.sbs`` container: named blobs, each at a multiple of 256 bytes.

Source: gemma.cpp ``io/blob_store.cc``, ``io/fields.cc``. Until July 2025 the directory followed the header at the start
of the file. Since then the directory and the real header are at its end.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from gemma2tool.containers import file_kind
from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import FileReader

MAGIC = 0x0A534253  # "SBS\n"
ALIGN, END_ALIGN = 256, 64 << 10
MAX_BLOBS = 16 << 10
MAX_LIST = 64 << 10
MAX_TEXT_WORDS = 64
_HEADER = struct.Struct("<IIQ")


@dataclass(frozen=True)
class Blob:
    """``nbytes`` bytes, starting at ``offset`` from the start of the file."""

    offset: int
    nbytes: int


def read_directory(reader: FileReader) -> dict[str, Blob]:
    """Reads the blobs by key, in file order. Raises InputRefused (``sbs.*``) unless they fill the file without gaps."""
    if reader.size < _HEADER.size:
        file_kind.refuse_foreign(reader, "sbs")
        raise refusal("truncated", reader.path, "is too short for a header")
    magic, count, size = _HEADER.unpack(reader.pread(0, _HEADER.size))
    if magic != MAGIC:
        file_kind.refuse_foreign(reader, "sbs")
        raise refusal("magic", reader.path, "does not begin with SBS")
    at_end = count == 0
    if at_end:
        magic, count, size = _HEADER.unpack(reader.pread(reader.size - _HEADER.size, _HEADER.size))
        if magic != MAGIC or count == 0:
            raise refusal("truncated", reader.path, "has no directory at its end: it was truncated or not finished")
    if size != reader.size:
        raise refusal("truncated", reader.path, f"has {reader.size} bytes, but its header says {size}")
    if count > MAX_BLOBS:
        raise refusal("too-many-blobs", reader.path, f"has a count of {count} blobs; at most {MAX_BLOBS} are accepted")
    nbytes = 32 * count
    start = reader.size - _HEADER.size - nbytes if at_end else _HEADER.size
    if start < _HEADER.size:
        raise refusal("truncated", reader.path, f"is too short for a directory of {count} blobs")
    raw = bytes(reader.pread(start, nbytes))
    blobs: dict[str, Blob] = {}
    expected = ALIGN if at_end else _aligned(_HEADER.size + nbytes)
    limit = start if at_end else reader.size
    for index in range(count):
        key = _key(reader.path, raw[16 * index : 16 * index + 16])
        offset, length = struct.unpack_from("<QQ", raw, 16 * (count + index))
        if key in blobs:
            raise refusal("duplicate-key", reader.path, f"the blob {quoted(key)} appears twice")
        if offset != expected or length == 0 or offset + length > limit:
            raise refusal("extent", reader.path, f"the blob {quoted(key)} does not start where the previous one ends")
        blobs[key] = Blob(offset, length)
        expected = _aligned(offset + length)
    return blobs


def _key(path: Path, raw: bytes) -> str:
    text, _, rest = raw.partition(b"\0")
    if not text or rest.strip(b"\0") or not text.isascii() or not text.decode().isprintable():
        raise refusal("key", path, f"has the blob name {quoted(raw)}")
    return text.decode()


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


def layout(blobs: Sequence[tuple[str, int]]) -> tuple[list[tuple[int, bytes]], dict[str, int], int]:
    """Returns the bytes around the blobs as (offset, bytes), each blob's offset (name -> offset), and the file's size.

    ``blobs`` are (name, size). The layout is the one that gemma.cpp has written since July 2025.
    """
    offsets: dict[str, int] = {}
    offset = ALIGN
    for name, nbytes in blobs:
        offsets[name] = offset
        offset = _aligned(offset + nbytes)
    directory = b"".join(name.encode().ljust(16, b"\0") for name, _ in blobs)
    directory += b"".join(struct.pack("<QQ", offsets[name], nbytes) for name, nbytes in blobs)
    total = -(-(offset + _aligned(_HEADER.size + len(directory))) // END_ALIGN) * END_ALIGN
    tail = directory + _HEADER.pack(MAGIC, len(blobs), total)
    front = _HEADER.pack(MAGIC, 0, END_ALIGN).ljust(ALIGN, b"\0")
    return [(0, front), (total - len(tail), tail)], offsets, total


# -- records of 32-bit words -------------------------------------------------------------------------------------------

Kind: TypeAlias = "Literal['u32', 'bool', 'i32', 'f32', 'text'] | Mapping[str, Kind] | list[Kind]"
"""A kind of value. A mapping is the schema of a nested record, a list has the kind of its elements as its only item."""
Schema: TypeAlias = Mapping[str, Kind]
"""Field name to kind, in the order of the record."""


class RecordReader:
    """Reads records: a count of words, then the fields in schema order. Records of older writers end early."""

    def __init__(self, data: bytes, path: Path, what: str) -> None:
        if len(data) % 4:
            raise refusal("record", path, f"the blob {what!r} is not a whole number of words")
        self.words = struct.unpack(f"<{len(data) // 4}I", data)
        self.path, self.what, self.at = path, what, 0

    @property
    def done(self) -> bool:
        return self.at >= len(self.words)

    def record(self, schema: Schema, limit: int | None = None) -> dict[str, Any]:
        count = self._word(len(self.words) if limit is None else limit)
        end = self.at + count
        if end > (len(self.words) if limit is None else limit):
            raise self._broken("has a record longer than itself")
        result: dict[str, Any] = {}
        for name, kind in schema.items():
            if self.at >= end:
                break
            result[name] = self._value(kind, end)
        self.at = end
        return result

    def _value(self, kind: Kind, end: int) -> Any:
        if isinstance(kind, Mapping):
            return self.record(kind, end)
        if isinstance(kind, list):
            count = self._word(end)
            if count > min(MAX_LIST, end - self.at):
                raise self._broken(f"has a list of {count} values")
            return [self._value(kind[0], end) for _ in range(count)]
        if kind == "text":
            count = self._word(end)
            if count > min(MAX_TEXT_WORDS, end - self.at):
                raise self._broken(f"has a text of {count} words")
            raw = b"".join(struct.pack("<I", self._word(end)) for _ in range(count)).rstrip(b"\0")
            if not raw.isascii() or b"\0" in raw:
                raise self._broken("has a text that is not ASCII")
            return raw.decode()
        word = self._word(end)
        if kind == "bool" and word > 1:
            raise self._broken(f"has the bool {word}")
        return struct.unpack(_struct_code(kind), struct.pack("<I", word))[0]

    def _word(self, end: int) -> int:
        if self.at >= end:
            raise self._broken("ends too early")
        self.at += 1
        return int(self.words[self.at - 1])

    def _broken(self, message: str) -> InputRefused:
        return refusal("record", self.path, f"the blob {self.what!r} {message}")


def _struct_code(kind: str) -> str:
    return {"f32": "<f", "i32": "<i"}.get(kind, "<I")


def pack_record(schema: Schema, values: Mapping[str, Any]) -> bytes:
    """Returns a record: its number of words, then its fields."""
    body = b"".join(_packed(kind, values[name]) for name, kind in schema.items())
    return struct.pack("<I", len(body) // 4) + body


def _packed(kind: Kind, value: Any) -> bytes:
    if isinstance(kind, Mapping):
        return pack_record(kind, value)
    if isinstance(kind, list):
        return struct.pack("<I", len(value)) + b"".join(_packed(kind[0], item) for item in value)
    if kind == "text":
        raw: bytes = value.encode("ascii")
        raw += b"\0" * (-len(raw) % 4)
        return struct.pack("<I", len(raw) // 4) + raw
    return struct.pack(_struct_code(kind), value)


def refusal(kind: str, path: Path, message: str) -> InputRefused:
    return InputRefused(f"sbs.{kind}", f"{path.name}: {message}")
