"""The GGUF container: a header of key-values and tensor infos, then the tensors' bytes, each padded to the alignment.

Rules: the format's specification (ggml ``docs/gguf.md``) and what llama.cpp's ``gguf.cpp`` refuses. Everything is bounded before
it is allocated. Integers are little-endian; versions 2 and 3 have the same layout.
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
from typing import Any, NoReturn

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
MAX_STRINGS = 1_500_000  # in all arrays; a vocabulary and its merges have under a million
MAX_ALIGNMENT = 1 << 16
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

# Value types, by their numbers in the file. The letters mean the same sizes to struct and, wherever Python runs, to array.
UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
_FORMATS = {
    UINT8: "B", INT8: "b", UINT16: "H", INT16: "h", UINT32: "I", INT32: "i", FLOAT32: "f", UINT64: "Q", INT64: "q", FLOAT64: "d",
}  # fmt: skip
_SCALARS = {kind: struct.Struct("<" + code) for kind, code in _FORMATS.items()}
_U32, _U64 = _SCALARS[UINT32], _SCALARS[UINT64]

# ggml tensor type: (elements a block, bytes a block), from ggml.c's type traits. Numbers missing here were withdrawn.
BLOCKS: dict[int, tuple[int, int]] = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    9: (32, 36),  # Q8_1 (gguf-py 0.19 says 40, from before its scales became halves)
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    15: (256, 292),  # Q8_K
    16: (256, 66),  # IQ2_XXS
    17: (256, 74),  # IQ2_XS
    18: (256, 98),  # IQ3_XXS
    19: (256, 50),  # IQ1_S
    20: (32, 18),  # IQ4_NL
    21: (256, 110),  # IQ3_S
    22: (256, 82),  # IQ2_S
    23: (256, 136),  # IQ4_XS
    24: (1, 1),  # I8
    25: (1, 2),  # I16
    26: (1, 4),  # I32
    27: (1, 8),  # I64
    28: (1, 8),  # F64
    29: (256, 56),  # IQ1_M
    30: (1, 2),  # BF16
    34: (256, 54),  # TQ1_0
    35: (256, 66),  # TQ2_0
    39: (32, 17),  # MXFP4
    40: (64, 36),  # NVFP4
    41: (128, 18),  # Q1_0
}
_HINT = "the file is damaged or hostile; download it again"


@dataclass(frozen=True, slots=True)
class GGUFValue:
    """A value and its type (``UINT8`` ... ``FLOAT64``). ``element_type`` is set for arrays only.

    ``value`` is an int, float, bool or str, or for an array a list of str, a list of bool, or an ``array.array`` of numbers. Text
    that is not UTF-8 keeps its bytes as surrogate escapes.
    """

    type: int
    element_type: int | None
    value: Any


@dataclass(frozen=True, slots=True)
class GGUFTensorEntry:
    """Where a tensor lies: ``dims`` innermost first, ``offset`` absolute in the file, ``nbytes`` without padding."""

    name: str
    type_id: int
    dims: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """All that a GGUF file says before its data, in the order of the file."""

    path: Path
    version: int
    alignment: int
    kv: dict[str, GGUFValue] = field(repr=False)
    tensors: dict[str, GGUFTensorEntry] = field(repr=False)
    data_start: int
    file_size: int


def read_header(path: str | os.PathLike[str], blocks: Mapping[int, tuple[int, int]] = BLOCKS) -> GGUFHeader:
    """The header of a GGUF file, checked against the file's size. Raises InputRefused (``gguf.*``).

    ``blocks`` maps each tensor type that is accepted to (elements, bytes) a block.
    """
    path = Path(path)
    with open_for_reading(path) as reader:
        cursor = _Cursor(reader)
        version = _version(cursor)
        tensor_count, kv_count = cursor.number(_U64), cursor.number(_U64)
        if tensor_count > MAX_TENSORS:
            cursor.refuse(
                "too-many-tensors", f"says it holds {tensor_count} tensors; at most {MAX_TENSORS} are accepted"
            )
        if kv_count > MAX_KV:
            cursor.refuse("too-many-keys", f"says it holds {kv_count} key-values; at most {MAX_KV} are accepted")
        kv: dict[str, GGUFValue] = {}
        for _ in range(kv_count):
            key = cursor.name("key")
            if key in kv:
                cursor.refuse("duplicate-key", f"the key {quoted(key)} appears twice")
            kv[key] = _value(cursor, key)
        alignment = _alignment(cursor, kv)
        infos = _tensor_infos(cursor, tensor_count, blocks)
        data_start = _padded(cursor.position, alignment)
        tensors = _placed(cursor, infos, data_start, alignment)
        return GGUFHeader(path, version, alignment, kv, tensors, data_start, reader.size)


class _Cursor:
    """A position in the header, of which more is read as it is needed."""

    def __init__(self, reader: FileReader) -> None:
        self.reader = reader
        self.data = bytearray()
        self.position = 0
        self.strings = 0  # in arrays so far

    def refuse(self, kind: str, message: str) -> NoReturn:
        raise InputRefused(f"gguf.{kind}", f"{self.reader.path}: {message}", hint=_HINT)

    def need(self, count: int) -> None:
        """Makes ``data`` reach ``count`` bytes beyond the position."""
        end = self.position + count
        if end <= len(self.data):
            return
        if end > self.reader.size:
            self.refuse(
                "truncated", f"ends at byte {self.reader.size}, but its header goes on to byte {end} or further"
            )
        if end > MAX_HEADER_BYTES:
            self.refuse("header-too-large", f"its header has more than {MAX_HEADER_BYTES} bytes")
        upto = min(max(end, 2 * len(self.data), 1 << 16), self.reader.size)
        self.data += self.reader.pread(len(self.data), upto - len(self.data))

    def number(self, kind: struct.Struct) -> Any:
        self.need(kind.size)
        (value,) = kind.unpack_from(self.data, self.position)
        self.position += kind.size
        return value

    def bytes(self, count: int) -> bytes:
        self.need(count)
        self.position += count
        return bytes(self.data[self.position - count : self.position])

    def name(self, what: str) -> str:
        """A key or a tensor's name: not empty, UTF-8, of bounded length."""
        length = self.number(_U64)
        if not 0 < length <= MAX_NAME_BYTES:
            self.refuse("name-length", f"a {what} has a length of {length} bytes")
        raw = self.bytes(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.refuse("name-utf8", f"the {what} {quoted(raw)} is not UTF-8")

    def text(self) -> str:
        return self.bytes(self.number(_U64)).decode("utf-8", "surrogateescape")

    def texts(self, count: int) -> list[str]:
        """``count`` strings, fast: a vocabulary holds hundreds of thousands."""
        result = []
        unpack, need = _U64.unpack_from, self.need
        for _ in range(count):
            need(8)
            begin = self.position + 8
            self.position = begin
            (length,) = unpack(self.data, begin - 8)
            need(length)
            self.position = begin + length
            result.append(self.data[begin : begin + length].decode("utf-8", "surrogateescape"))
        return result


def _version(cursor: _Cursor) -> int:
    if cursor.reader.size < 4 or cursor.bytes(4) != MAGIC:
        cursor.refuse("magic", "does not begin with GGUF")
    version = cursor.number(_U32)
    if version not in VERSIONS:
        if version and version & 0xFFFF == 0:
            cursor.refuse("big-endian", "is a big-endian file; only little-endian ones are read")
        cursor.refuse("version", f"is of GGUF version {version}; versions 2 and 3 are read")
    return version


def _value(cursor: _Cursor, key: str) -> GGUFValue:
    kind = cursor.number(_U32)
    if kind in _SCALARS:
        return GGUFValue(kind, None, cursor.number(_SCALARS[kind]))
    if kind == BOOL:
        return GGUFValue(kind, None, _bools(cursor, key, 1)[0])
    if kind == STRING:
        return GGUFValue(kind, None, cursor.text())
    if kind == ARRAY:
        element, count = cursor.number(_U32), cursor.number(_U64)
        return GGUFValue(kind, element, _elements(cursor, key, element, count))
    cursor.refuse("value-type", f"the key {quoted(key)} has the unknown value type {kind}")


def _elements(cursor: _Cursor, key: str, kind: int, count: int) -> Any:
    size = 8 if kind == STRING else 1 if kind == BOOL else _SCALARS[kind].size if kind in _SCALARS else None
    if size is None:
        what = "is an array of arrays" if kind == ARRAY else f"is an array of the unknown value type {kind}"
        cursor.refuse("array-type", f"the key {quoted(key)} {what}")
    if count * size > cursor.reader.size - cursor.position:
        cursor.refuse(
            "array-length", f"the key {quoted(key)} is an array of {count} elements, more than the file can hold"
        )
    if kind == STRING:
        cursor.strings += count
        if cursor.strings > MAX_STRINGS:
            cursor.refuse(
                "array-length", f"its arrays hold {cursor.strings} texts or more; at most {MAX_STRINGS} are accepted"
            )
        return cursor.texts(count)
    if kind == BOOL:
        return _bools(cursor, key, count)
    values = array(_FORMATS[kind], cursor.bytes(count * size))
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _bools(cursor: _Cursor, key: str, count: int) -> list[bool]:
    raw = cursor.bytes(count)
    if raw.strip(b"\0\1"):
        cursor.refuse("bool", f"the key {quoted(key)} has a truth value other than 0 and 1")
    return [value == 1 for value in raw]


def _alignment(cursor: _Cursor, kv: Mapping[str, GGUFValue]) -> int:
    value = kv.get(ALIGNMENT_KEY)
    if value is None:
        return DEFAULT_ALIGNMENT
    number = value.value
    if value.type != UINT32 or not 0 < number <= MAX_ALIGNMENT or number & (number - 1):
        cursor.refuse(
            "alignment", f"{ALIGNMENT_KEY} is {quoted(number)}; it must be a uint32 power of two up to {MAX_ALIGNMENT}"
        )
    return number


def _tensor_infos(
    cursor: _Cursor, count: int, blocks: Mapping[int, tuple[int, int]]
) -> dict[str, tuple[int, tuple[int, ...], int, int]]:
    """name -> (type, dims, relative offset, bytes), in file order."""
    infos: dict[str, tuple[int, tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = cursor.name("tensor name")
        where = f"tensor {quoted(name)}"
        if name in infos:
            cursor.refuse("duplicate-tensor", f"{where} appears twice")
        ndim = cursor.number(_U32)
        if ndim > MAX_DIMS:
            cursor.refuse("dims", f"{where} has {ndim} dimensions; at most {MAX_DIMS} are possible")
        dims = tuple(cursor.number(_U64) for _ in range(ndim))
        type_id, offset = cursor.number(_U32), cursor.number(_U64)
        if type_id not in blocks:
            cursor.refuse("tensor-type", f"{where} is of the unknown type {type_id}")
        elements, size = blocks[type_id]
        # A dimension of 0 must not hide others whose product overflows.
        if prod(dim for dim in dims if dim) * size >= 1 << 63:
            cursor.refuse("overflow", f"{where}: the product of its dimensions {dims} overflows")
        if elements > 1 and (not dims or dims[0] % elements):
            cursor.refuse("block", f"{where}: rows of {dims[0] if dims else 1} do not divide into blocks of {elements}")
        infos[name] = type_id, dims, offset, prod(dims) // elements * size
    return infos


def _placed(
    cursor: _Cursor, infos: Mapping[str, tuple[int, tuple[int, ...], int, int]], data_start: int, alignment: int
) -> dict[str, GGUFTensorEntry]:
    """Each tensor must begin where the padded one before it ends, as llama.cpp requires, and the file must end with the last."""
    tensors: dict[str, GGUFTensorEntry] = {}
    expected = end = 0
    for name, (type_id, dims, offset, nbytes) in infos.items():
        if offset != expected:
            where = f"tensor {quoted(name)} begins at byte {offset} of the data"
            if offset % alignment:
                cursor.refuse("unaligned", f"{where}, which is not a multiple of {alignment}")
            if offset < expected:
                cursor.refuse("overlap", f"{where} and overlaps the one before it, which ends at {expected}")
            cursor.refuse("gap", f"{where}; the one before it ends at {expected}")
        tensors[name] = GGUFTensorEntry(name, type_id, dims, data_start + offset, nbytes)
        end = offset + nbytes
        expected = _padded(end, alignment)
    size = cursor.reader.size
    if infos and size < data_start + end:
        cursor.refuse("past-end", f"has {size} bytes, its tensors end at byte {data_start + end}")
    if size > data_start + expected:
        cursor.refuse("trailing-bytes", f"{size - data_start - expected} bytes follow its last tensor")
    return tensors


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def encode_header(
    kv: Sequence[tuple[str, GGUFValue]],
    tensors: Sequence[tuple[str, Sequence[int], int, int]],
    alignment: int = DEFAULT_ALIGNMENT,
    version: int = 3,
) -> tuple[bytes, dict[str, int], int]:
    """The bytes that come before the data, each tensor's absolute offset, and the file's size.

    ``tensors`` are (name, dims innermost first, type id, bytes) in file order; each is followed by zeros up to ``alignment``, the
    last one too. Equal to what gguf-py's GGUFWriter writes. A caller with another alignment also puts ``general.alignment`` in kv.
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
        raise ValueError(f"no such value type: {kind}")
