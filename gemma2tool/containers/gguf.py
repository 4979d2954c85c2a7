"""The GGUF container: a header of key-values and tensor infos, then each tensor's bytes, padded to the alignment.

Sources: the specification (ggml ``docs/gguf.md``) and the checks in llama.cpp's ``gguf.cpp``. Sizes are checked against
limits before anything is allocated. Integers are little-endian. Versions 2 and 3 have the same layout.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from gemma2tool.containers import file_kind
from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import FileReader, open_for_reading

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 64 << 20  # 256,000 tokens take about 8 MB
MAX_KV = 10_000
MAX_TENSORS = 20_000
MAX_DIMS = 4  # ggml's GGML_MAX_DIMS
MAX_NAME_BYTES = (1 << 16) - 1
MAX_STRINGS = 1_500_000  # in all arrays together; a vocabulary and its merges have fewer than a million
MAX_ALIGNMENT = 1 << 16
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_PADDING = 1 << 20
"""Zeros that may follow the last tensor."""

# Value types, by their numbers in the file. The type codes below have the same sizes in struct and in array.
UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
_FORMATS = {
    UINT8: "B", INT8: "b", UINT16: "H", INT16: "h", UINT32: "I", INT32: "i", FLOAT32: "f", UINT64: "Q", INT64: "q",
    FLOAT64: "d",
}  # fmt: skip
_SCALARS = {kind: struct.Struct("<" + code) for kind, code in _FORMATS.items()}
_U32, _U64 = _SCALARS[UINT32], _SCALARS[UINT64]


@dataclass(frozen=True, slots=True)
class GGUFValue:
    """A value and its type (``UINT8`` ... ``FLOAT64``). ``element_type`` is set only for arrays.

    ``value`` is an int, float, bool or str; for an array, a list of str, a list of bool or an ``array.array`` of
    numbers. Text that is not UTF-8 keeps its bytes as surrogate escapes.
    """

    type: int
    element_type: int | None
    value: Any


@dataclass(frozen=True, slots=True)
class GGUFTensorEntry:
    """The place of a tensor: ``dims`` innermost first, ``offset`` from the start of the file, ``nbytes`` without
    padding.
    """

    name: str
    type_id: int
    dims: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Everything in a GGUF file before its data, in file order."""

    path: Path
    version: int
    alignment: int
    kv: dict[str, GGUFValue] = field(repr=False)
    tensors: dict[str, GGUFTensorEntry] = field(repr=False)
    data_start: int
    file_size: int


def read_header(
    path: str | os.PathLike[str],
    blocks: Mapping[int, tuple[int, int]],
    other_types: Mapping[int, str] | None = None,
) -> GGUFHeader:
    """Reads the header of a GGUF file and checks it against the file's size. Raises InputRefused (``gguf.*``).

    ``blocks`` maps each accepted tensor type to (elements, bytes) per block; ``other_types`` names types that are not.
    """
    path = Path(path)
    with open_for_reading(path) as reader:
        cursor = Cursor(reader)
        version = read_version(cursor)
        tensor_count, kv_count = cursor.integer(_U64), cursor.integer(_U64)
        if tensor_count > MAX_TENSORS:
            raise cursor.refusal(
                "too-many-tensors", f"has a count of {tensor_count} tensors; at most {MAX_TENSORS} are accepted"
            )
        if kv_count > MAX_KV:
            raise cursor.refusal(
                "too-many-keys", f"has a count of {kv_count} key-values; at most {MAX_KV} are accepted"
            )
        kv: dict[str, GGUFValue] = {}
        for _ in range(kv_count):
            key = cursor.name("key")
            if key in kv:
                raise cursor.refusal("duplicate-key", f"the key {quoted(key)} appears twice")
            kv[key] = read_value(cursor, key)
        alignment = _alignment(cursor, kv)
        infos = _tensor_infos(cursor, tensor_count, blocks, other_types or {})
        data_start = _padded(cursor.position, alignment)
        tensors = _entries(cursor, infos, data_start, alignment)
        return GGUFHeader(path, version, alignment, kv, tensors, data_start, reader.size)


class Cursor:
    """A position in the header, which is read as far as needed."""

    def __init__(self, reader: FileReader) -> None:
        self.reader = reader
        self.data = bytearray()
        self.position = 0
        self.strings = 0  # in arrays so far

    def refusal(self, kind: str, message: str) -> InputRefused:
        return InputRefused(f"gguf.{kind}", f"{self.reader.path}: {message}")

    def need(self, count: int) -> None:
        """Reads on until ``data`` has ``count`` bytes after the position."""
        self.read_to(self.position + count)

    def read_to(self, end: int) -> None:
        """Reads on until ``data`` has ``end`` bytes."""
        if end <= len(self.data):
            return
        if end > self.reader.size:
            raise self.refusal(
                "truncated", f"ends at byte {self.reader.size}, but its header continues to byte {end} or beyond"
            )
        if end > MAX_HEADER_BYTES:
            raise self.refusal("header-too-large", f"its header is longer than {MAX_HEADER_BYTES} bytes")
        upto = min(max(end, 2 * len(self.data), 1 << 16), self.reader.size)
        self.data += self.reader.pread(len(self.data), upto - len(self.data))

    def number(self, kind: struct.Struct) -> Any:
        self.need(kind.size)
        (value,) = kind.unpack_from(self.data, self.position)
        self.position += kind.size
        return value

    def integer(self, kind: struct.Struct) -> int:
        return int(self.number(kind))

    def bytes(self, count: int) -> bytes:
        self.need(count)
        self.position += count
        return bytes(self.data[self.position - count : self.position])

    def name(self, what: str) -> str:
        """A key or a tensor name: UTF-8, not empty, not too long."""
        length = self.integer(_U64)
        if not 0 < length <= MAX_NAME_BYTES:
            raise self.refusal("name-length", f"a {what} has a length of {length} bytes")
        raw = self.bytes(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refusal("name-utf8", f"the {what} {quoted(raw)} is not UTF-8") from error

    def text(self) -> str:
        return self.bytes(self.integer(_U64)).decode("utf-8", "surrogateescape")

    def texts(self, count: int) -> list[str]:
        """Reads ``count`` strings, fast, because a vocabulary has hundreds of thousands."""
        result = []
        data, unpack = self.data, _U64.unpack_from  # the buffer stays the same object as it grows
        position, available = self.position, len(data)
        for _ in range(count):
            begin = position + 8
            if begin > available:
                self.read_to(begin)
                available = len(data)
            (length,) = unpack(data, position)
            position = begin + length
            if position > available:
                self.read_to(position)
                available = len(data)
            result.append(data[begin:position].decode("utf-8", "surrogateescape"))
        self.position = position
        return result


def read_version(cursor: Cursor) -> int:
    if cursor.reader.size < 4 or cursor.bytes(4) != MAGIC:
        file_kind.refuse_foreign(cursor.reader, "gguf")
        raise cursor.refusal("magic", "does not begin with GGUF")
    version = cursor.integer(_U32)
    if version not in VERSIONS:
        if version and version & 0xFFFF == 0:
            raise cursor.refusal("big-endian", "is big-endian; only little-endian files are read")
        raise cursor.refusal("version", f"has GGUF version {version}; only versions 2 and 3 are read")
    return version


def read_value(cursor: Cursor, key: str) -> GGUFValue:
    kind = cursor.integer(_U32)
    if kind in _SCALARS:
        return GGUFValue(kind, None, cursor.number(_SCALARS[kind]))
    if kind == BOOL:
        return GGUFValue(kind, None, _bools(cursor, key, 1)[0])
    if kind == STRING:
        return GGUFValue(kind, None, cursor.text())
    if kind != ARRAY:
        raise cursor.refusal("value-type", f"the key {quoted(key)} has the unknown value type {kind}")
    element_type, count = cursor.integer(_U32), cursor.integer(_U64)
    return GGUFValue(kind, element_type, _elements(cursor, key, element_type, count))


def _elements(cursor: Cursor, key: str, kind: int, count: int) -> Any:
    size = {STRING: _U64.size, BOOL: 1}.get(kind) or (_SCALARS[kind].size if kind in _SCALARS else None)
    if size is None:
        what = "is an array of arrays" if kind == ARRAY else f"is an array of the unknown value type {kind}"
        raise cursor.refusal("array-type", f"the key {quoted(key)} {what}")
    if count * size > cursor.reader.size - cursor.position:
        raise cursor.refusal(
            "array-length", f"the key {quoted(key)} is an array of {count} elements, more than fit in the file"
        )
    if kind == STRING:
        cursor.strings += count
        if cursor.strings > MAX_STRINGS:
            raise cursor.refusal(
                "array-length",
                f"its arrays contain at least {cursor.strings} strings; at most {MAX_STRINGS} are accepted",
            )
        return cursor.texts(count)
    if kind == BOOL:
        return _bools(cursor, key, count)
    values = array(_FORMATS[kind], cursor.bytes(count * size))
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _bools(cursor: Cursor, key: str, count: int) -> list[bool]:
    raw = cursor.bytes(count)
    if raw.strip(b"\0\1"):
        raise cursor.refusal("bool", f"the key {quoted(key)} has a bool other than 0 and 1")
    return [value == 1 for value in raw]


def _alignment(cursor: Cursor, kv: Mapping[str, GGUFValue]) -> int:
    value = kv.get(ALIGNMENT_KEY)
    if value is None:
        return DEFAULT_ALIGNMENT
    alignment = int(value.value) if value.type == UINT32 else 0
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.refusal(
            "alignment",
            f"{ALIGNMENT_KEY} is {quoted(value.value)}; it must be a uint32 power of two up to {MAX_ALIGNMENT}",
        )
    return alignment


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    """A tensor as the header describes it; ``offset`` is relative to the data."""

    type_id: int
    dims: tuple[int, ...]
    offset: int
    nbytes: int


def _tensor_infos(
    cursor: Cursor, count: int, blocks: Mapping[int, tuple[int, int]], other_types: Mapping[int, str]
) -> dict[str, _TensorInfo]:
    infos: dict[str, _TensorInfo] = {}
    for _ in range(count):
        name = cursor.name("tensor name")
        where = f"tensor {quoted(name)}"
        if name in infos:
            raise cursor.refusal("duplicate-tensor", f"{where} appears twice")
        ndim = cursor.integer(_U32)
        if ndim > MAX_DIMS:
            raise cursor.refusal("dims", f"{where} has {ndim} dimensions; at most {MAX_DIMS} are accepted")
        dims = tuple(cursor.integer(_U64) for _ in range(ndim))
        type_id, offset = cursor.integer(_U32), cursor.integer(_U64)
        if type_id not in blocks:
            known = f", {other_types[type_id]}" if type_id in other_types else ""
            raise cursor.refusal("tensor-type", f"{where} has the type {type_id}{known}, which is not supported")
        elements, size = blocks[type_id]
        # Without the zeros, so that a dimension of 0 does not hide an overflow of the others.
        if prod(dim for dim in dims if dim) * size >= 1 << 63:
            raise cursor.refusal("overflow", f"{where}: the product of its dimensions {dims} overflows")
        if elements > 1 and (not dims or dims[0] % elements):
            raise cursor.refusal(
                "block", f"{where}: rows of {dims[0] if dims else 1} do not divide into blocks of {elements}"
            )
        infos[name] = _TensorInfo(type_id, dims, offset, prod(dims) // elements * size)
    return infos


def _entries(
    cursor: Cursor, infos: Mapping[str, _TensorInfo], data_start: int, alignment: int
) -> dict[str, GGUFTensorEntry]:
    """Checks that each tensor begins where the previous one, padded, ends (as llama.cpp requires), and the file ends
    with the last.
    """
    tensors: dict[str, GGUFTensorEntry] = {}
    expected = end = 0
    for name, info in infos.items():
        if info.offset != expected:
            where = f"tensor {quoted(name)} begins at byte {info.offset} of the data"
            if info.offset % alignment:
                raise cursor.refusal("unaligned", f"{where}, which is not a multiple of {alignment}")
            if info.offset < expected:
                raise cursor.refusal("overlap", f"{where} and overlaps the previous tensor, which ends at {expected}")
            raise cursor.refusal("gap", f"{where}; the previous tensor ends at {expected}")
        tensors[name] = GGUFTensorEntry(name, info.type_id, info.dims, data_start + info.offset, info.nbytes)
        end = info.offset + info.nbytes
        expected = _padded(end, alignment)
    size = cursor.reader.size
    if infos and size < data_start + end:
        raise cursor.refusal("past-end", f"has {size} bytes, but its tensors end at byte {data_start + end}")
    more = size - data_start - expected
    if more > 0 and not _are_zeros(cursor.reader, size - more, more):
        raise cursor.refusal("trailing-bytes", f"{more} bytes follow its last tensor")
    return tensors


def _are_zeros(reader: FileReader, offset: int, count: int) -> bool:
    """Whether a file's end is more padding than the alignment requires, as some storage adds."""
    return count <= MAX_PADDING and not any(reader.pread(offset, count))


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def encode_header(
    kv: Sequence[tuple[str, GGUFValue]],
    tensors: Sequence[tuple[str, Sequence[int], int, int]],
    alignment: int = DEFAULT_ALIGNMENT,
    version: int = 3,
) -> tuple[bytes, dict[str, int], int]:
    """Returns the bytes before the data, each tensor's absolute offset (name -> offset), and the file's size.

    ``tensors`` are (name, dims innermost first, type id, bytes) in file order. Each one, including the last, is padded
    with zeros to ``alignment``. The result equals what gguf-py's GGUFWriter writes. If ``alignment`` is not the
    default, ``kv`` must contain ``general.alignment``.
    """
    out = bytearray(MAGIC)
    out += struct.pack("<IQQ", version, len(tensors), len(kv))
    for key, value in kv:
        _put_text(out, key)
        out += _U32.pack(value.type)
        if value.type == ARRAY:
            out += struct.pack("<IQ", value.element_type, len(value.value))
            _put_elements(out, value.element_type, value.value)
        else:
            _put_elements(out, value.type, [value.value])
    offsets: dict[str, int] = {}
    size = 0
    for name, dims, type_id, nbytes in tensors:
        if name in offsets:
            raise ValueError(f"duplicate tensor name {name}")
        _put_text(out, name)
        out += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, size)
        offsets[name] = size
        size = _padded(size + nbytes, alignment)
    out += bytes(-len(out) % alignment)
    return bytes(out), {name: len(out) + offset for name, offset in offsets.items()}, len(out) + size


def _put_text(out: bytearray, text: str) -> None:
    raw = text.encode("utf-8", "surrogateescape")
    out += _U64.pack(len(raw))
    out += raw


def _put_elements(out: bytearray, kind: int | None, values: Iterable[Any]) -> None:
    if kind == STRING:
        for text in values:
            _put_text(out, text)
    elif kind == BOOL:
        out += bytes(bool(value) for value in values)
    elif kind in _FORMATS:
        values = list(values)
        out += struct.pack(f"<{len(values)}{_FORMATS[kind]}", *values)
    else:
        raise ValueError(f"unknown value type {kind}")
