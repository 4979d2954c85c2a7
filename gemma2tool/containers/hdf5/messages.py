"""The messages in HDF5 object headers that describe groups and plain arrays.

Source: HDF5 File Format Specification 3.0, section IV.A.2.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gemma2tool.errors import InputRefused

DATASPACE, LINK_INFO, DATATYPE, LINK, EXTERNAL, LAYOUT = 1, 2, 3, 6, 7, 8
GROUP_INFO, FILTERS, ATTRIBUTE, CONTINUATION, SYMBOL_TABLE = 10, 11, 12, 16, 17
MAX_MESSAGES = 4096
MAX_RANK = 8

# Class 1 (floating point): bit field, size and properties of the little-endian IEEE types, as they follow version and
# class.
_FLOATS = {
    bytes.fromhex("20 0f 00 02000000 0000 1000 0a 05 00 0a 0f000000"): ("F16", 2),
    bytes.fromhex("20 1f 00 04000000 0000 2000 17 08 00 17 7f000000"): ("F32", 4),
    bytes.fromhex("20 3f 00 08000000 0000 4000 34 0b 00 34 ff030000"): ("F64", 8),
}
# Class 0 (fixed point), the same way: little-endian, all bits used.
_INTEGERS = {
    bytes.fromhex("08 00 00 01000000 0000 0800"): ("I8", 1),
    bytes.fromhex("00 00 00 01000000 0000 0800"): ("U8", 1),
    bytes.fromhex("08 00 00 04000000 0000 2000"): ("I32", 4),
    bytes.fromhex("08 00 00 08000000 0000 4000"): ("I64", 8),
}
_FIXED, _FLOAT, _STRING, _OPAQUE, _VARIABLE = 0, 1, 3, 5, 9
_LAYOUTS = {
    0: ("compact", "is stored inside its header"),
    2: ("chunked", "is stored in chunks; Keras stores arrays contiguously"),
    3: ("virtual", "is a virtual array, made from other files"),
}


Refusal = Callable[[str, str], InputRefused]
"""(last part of the error id, message) to the error."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message. If it is ``shared``, ``data`` is only a reference to the message."""

    kind: int
    shared: bool
    data: bytes


class NumberReader:
    """Reads the little-endian numbers of a message."""

    def __init__(self, data: bytes, refusal: Refusal) -> None:
        self.data, self.refusal, self.at = data, refusal, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self.refusal("broken", "a message of an object header is truncated")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def u8(self) -> int:
        return self.number(1)

    def u16(self) -> int:
        return self.number(2)

    def u32(self) -> int:
        return self.number(4)

    def u64(self) -> int:
        return self.number(8)


# -- headers -------------------------------------------------------------------------------------------------


def head_size(head: bytes) -> int:
    """Bytes before the messages in a version 2 header."""
    flags = head[5]
    return 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0) + (1 << (flags & 3))


def first_block(head: bytes, address: int, new: bool, refusal: Refusal) -> tuple[int, int]:
    """Returns (address, bytes) of the first messages, including their checksum in a version 2 header (``new``)."""
    if len(head) < 16:
        raise refusal("broken", f"ends inside the object header at byte {address}")
    if not new:
        if head[0] != 1 or head[1]:
            raise refusal("broken", f"has no object header at byte {address}")
        return address + 16, int.from_bytes(head[8:12], "little")
    size = head_size(head)
    if head[4] != 2 or len(head) < size:
        raise refusal(
            "broken", f"has an object header of version {head[4]} at byte {address}; version 1 or 2 is expected"
        )
    width = 1 << (head[5] & 3)
    return address + size, int.from_bytes(head[size - width : size], "little") + 4


def parse(raw: bytes, *, new: bool, ordered: bool, refusal: Refusal) -> Iterator[Message]:
    """Yields the messages of a block. A version 2 block may end with a few bytes that are too short for a message."""
    size = (6 if ordered else 4) if new else 8
    at = count = 0
    while at + size <= len(raw):
        kind, length, flags = struct.unpack_from("<BHB" if new else "<HHB", raw, at)
        at += size
        count += 1
        if at + length > len(raw) or count > MAX_MESSAGES:
            raise refusal(
                "broken",
                f"an object header has a message that is longer than itself, or more than {MAX_MESSAGES} messages",
            )
        yield Message(kind, bool(flags & 2), raw[at : at + length])
        at += length


# -- groups ------------------------------------------------------------------------------------------------------------


def link_heap(values: NumberReader) -> int:
    """The address of the fractal heap that holds a group's links if they do not fit in its header, else all ones
    (undefined).
    """
    if values.u8() != 0:
        raise values.refusal("broken", "a link info message has an unknown version")
    if values.u8() & 1:
        values.u64()
    return values.u64()


def hard_link(values: NumberReader, group: str, refusal: Refusal) -> tuple[str, int]:
    """Returns (name, address) of a link message. Raises InputRefused unless it is a hard link."""
    if values.u8() != 1:
        raise refusal("broken", "a link message has an unknown version")
    flags = values.u8()
    kind = values.u8() if flags & 8 else 0
    if flags & 4:
        values.u64()
    if flags & 0x10:
        values.u8()
    raw = values.take(values.number(1 << (flags & 3)))
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refusal("name", f"the name {raw[:64]!r} is not UTF-8") from error
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise refusal("name", f"the name {name[:64]!r} is not a plain name")
    if kind != 0:
        what = {1: "a soft link", 64: "a link into another file"}.get(kind, "a link of another kind")
        raise refusal("link", f"{name[:64]!r} in {group[:64]!r} is {what}")
    return name, values.u64()


# -- arrays ------------------------------------------------------------------------------------------------------------


def shape(data: bytes, where: str, refusal: Refusal) -> tuple[int, ...]:
    values = NumberReader(data, refusal)
    version, rank, flags = values.u8(), values.u8(), values.u8()
    if version == 1:
        values.take(5)
        simple = True
    elif version == 2:
        simple = values.u8() in (0, 1)
    else:
        raise refusal("broken", f"{where} has a dataspace of version {version}")
    if not simple or rank > MAX_RANK or flags & ~3:
        raise refusal("shape", f"{where} has no plain shape")
    dims = tuple(values.u64() for _ in range(rank))
    if any(dim >= 1 << 48 for dim in dims):
        raise refusal("shape", f"{where} has the shape {dims}")
    return dims


def datatype(data: bytes, where: str, refusal: Refusal) -> tuple[str, int]:
    """Returns (F16, F32, F64, I8, U8, I32, I64 or OPAQUE; bytes per value)."""
    if len(data) < 8:
        raise refusal("broken", f"{where} has a truncated type")
    kind, version = data[0] & 15, data[0] >> 4
    size = int.from_bytes(data[4:8], "little")
    if version in (1, 2, 3) and kind == _FLOAT and data[1:20] in _FLOATS:
        return _FLOATS[data[1:20]]
    if version in (1, 2, 3) and kind == _FIXED and data[1:12] in _INTEGERS:
        return _INTEGERS[data[1:12]]
    if kind == _OPAQUE and size == 2:
        return "OPAQUE", 2
    names = {
        0: "integers of an unsupported kind", 3: "strings", 6: "records", 7: "references", 9: "variable-length values",
        10: "arrays",
    }  # fmt: skip
    raise refusal(
        "dtype", f"{where} contains {names.get(kind, 'values of an unsupported type')}, not floats or plain integers"
    )


def layout(data: bytes, where: str, refusal: Refusal) -> tuple[int, int]:
    """Returns (address, bytes) of contiguous values."""
    values = NumberReader(data, refusal)
    version, kind = values.u8(), values.u8()
    if version not in (3, 4):
        raise refusal("broken", f"{where} has a layout of version {version}")
    if kind in _LAYOUTS:
        raise refusal(_LAYOUTS[kind][0], f"{where} {_LAYOUTS[kind][1]}")
    if kind != 1:
        raise refusal("broken", f"{where} has the unknown layout {kind}")
    return values.u64(), values.u64()


def text_attribute(data: bytes, name: str, refusal: Refusal) -> bytes | tuple[int, int, int] | None:
    """Returns the text of the attribute ``name``, or its (length, address, index) if it is in a global heap.

    Returns None for any other attribute.
    """
    values = NumberReader(data, refusal)
    version = values.u8()
    values.u8()
    sizes = values.u16(), values.u16(), values.u16()
    if version == 3:
        values.u8()
    elif version not in (1, 2):
        return None
    raw_name, kind, _ = (values.take(-(-size // 8) * 8 if version == 1 else size) for size in sizes)
    if raw_name.rstrip(b"\0") != name.encode() or len(kind) < 8:
        return None
    size = int.from_bytes(kind[4:8], "little")
    if kind[0] & 15 == _STRING:
        return values.take(size).rstrip(b"\0 ")
    if kind[0] & 15 == _VARIABLE and kind[1] & 15 == 1:
        return values.u32(), values.u64(), values.u32()
    return None


# -- the checksum ------------------------------------------------------------------------------------------------------

_MASK = 0xFFFFFFFF


def lookup3(data: bytes) -> int:
    """The checksum of HDF5's newer structures: Bob Jenkins' lookup3 (May 2006), ``hashlittle`` with the initial value
    0.
    """

    def rotated(value: int, count: int) -> int:
        return (value << count | value >> (32 - count)) & _MASK

    a = b = c = (0xDEADBEEF + len(data)) & _MASK
    if not data:
        return c
    words: tuple[int, ...] = struct.unpack(f"<{-(-len(data) // 4)}I", data + bytes(-len(data) % 4))
    words += (0,) * (-len(words) % 3)
    for at in range(0, len(words) - 3, 3):
        a, b, c = (a + words[at]) & _MASK, (b + words[at + 1]) & _MASK, (c + words[at + 2]) & _MASK
        a = (a - c) & _MASK ^ rotated(c, 4)
        c = (c + b) & _MASK
        b = (b - a) & _MASK ^ rotated(a, 6)
        a = (a + c) & _MASK
        c = (c - b) & _MASK ^ rotated(b, 8)
        b = (b + a) & _MASK
        a = (a - c) & _MASK ^ rotated(c, 16)
        c = (c + b) & _MASK
        b = (b - a) & _MASK ^ rotated(a, 19)
        a = (a + c) & _MASK
        c = (c - b) & _MASK ^ rotated(b, 4)
        b = (b + a) & _MASK
    a, b, c = (a + words[-3]) & _MASK, (b + words[-2]) & _MASK, (c + words[-1]) & _MASK
    for first, second, third in ((14, 11, 25), (16, 4, 14)):
        c = ((c ^ b) - rotated(b, first)) & _MASK
        a = ((a ^ c) - rotated(c, second)) & _MASK
        b = ((b ^ a) - rotated(a, third)) & _MASK
    return ((c ^ b) - rotated(b, 24)) & _MASK
