"""HDF5 files of plain arrays: where each array's bytes lie, found without libhdf5.

libhdf5 crashes, hangs and allocates on damaged files, and follows links into others. This reads the small part of the format that
saved weights use (HDF5 File Format Specification 3.0; sections in brackets): superblocks 0 to 3, groups as symbol tables or as link
messages, contiguous arrays of IEEE floats or of opaque two-byte values with an attribute that names them bfloat16. Everything else
is refused by name: links other than hard ones, chunks and filters, external and virtual storage, other types.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NoReturn

from gemma2tool.containers.hdf5 import messages
from gemma2tool.containers.hdf5.messages import Message, Values
from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import FileReader, open_for_reading

MAGIC = b"\x89HDF\r\n\x1a\n"
MAX_OBJECTS = 100_000
MAX_DEPTH = 32
MAX_STRUCTURE_BYTES = 64 << 20
"""Of headers, tables and names together; 27B takes under one million."""
MAX_BLOCK_BYTES = 1 << 20
MAX_NODES = 20_000
MAX_NAME_BYTES = 4096
UNDEFINED = (1 << 64) - 1
_HINT = "the file is damaged or was not saved by Keras: fetch it again"
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class HDF5Array:
    """``nbytes`` bytes from the absolute ``offset`` on; ``dtype`` spelled as in safetensors: F64, F32, F16 or BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_arrays(path: str | os.PathLike[str]) -> dict[str, HDF5Array]:
    """The arrays of a file by their full names ("layers/.../vars/0"). Raises InputRefused (``hdf5.*``).

    Every array lies inside the file, and no two overlap.
    """
    with open_for_reading(path) as reader:
        file = _File(reader)
        arrays = {array.name: array for array in file.walk(file.root())}
        file.check_apart(arrays)
        return arrays


class _File:
    """A file's structure, read block by block within one budget."""

    def __init__(self, reader: FileReader) -> None:
        self.reader = reader
        self.budget = MAX_STRUCTURE_BYTES
        self.base = 0

    def refuse(self, kind: str, message: str) -> NoReturn:
        raise refusal(kind, self.reader.path, message)

    def block(self, address: int, nbytes: int) -> bytes:
        """``nbytes`` bytes from an address, which counts from the superblock's base."""
        at = self.base + address
        if address == UNDEFINED or nbytes > MAX_BLOCK_BYTES or at + nbytes > self.reader.size:
            self.refuse("broken", f"points at {nbytes} bytes from byte {at} on, which it does not have")
        self.budget -= nbytes
        if self.budget < 0:
            self.refuse("too-many-objects", f"has more than {MAX_STRUCTURE_BYTES} bytes of structure")
        return bytes(self.reader.pread(at, nbytes))

    def signed(self, address: int, nbytes: int, signature: bytes) -> bytes:
        raw = self.block(address, nbytes)
        if not raw.startswith(signature):
            self.refuse("broken", f"has no {signature.decode()} at byte {self.base + address}")
        return raw

    # -- superblock [II.A] ---------------------------------------------------------------------------------------------

    def root(self) -> int:
        """The address of the root group's object header."""
        if self.reader.size < 48 or self.reader.pread(0, 8) != MAGIC:
            self.refuse("magic", "is not an HDF5 file")
        raw = bytes(self.reader.pread(0, min(96 + 4, self.reader.size)))
        version = raw[8]
        if version > 3:
            self.refuse("superblock", f"has a superblock of version {version}; versions 0 to 3 are read")
        sizes = raw[13:15] if version < 2 else raw[9:11]
        if sizes != b"\x08\x08":
            self.refuse(
                "superblock", f"counts in offsets and lengths of {sizes[0]} and {sizes[1]} bytes; 8 and 8 are read"
            )
        start = (24 if version == 0 else 28) if version < 2 else 12
        if len(raw) < start + 32 + (40 if version < 2 else 4):
            self.refuse("broken", "ends in its superblock")
        base, extra, end, last = struct.unpack_from("<4Q", raw, start)
        if version < 2:
            _, root = struct.unpack_from("<2Q", raw, start + 32)
            driver = last
        else:
            root, driver = last, UNDEFINED
            if messages.lookup3(raw[: start + 32]) != struct.unpack_from("<I", raw, start + 32)[0]:
                self.refuse("checksum", "its superblock is damaged")
        if base != 0 or driver != UNDEFINED or extra != UNDEFINED:
            self.refuse("superblock", "has a user block, a driver or a superblock extension")
        if end > self.reader.size:
            self.refuse("truncated", f"has {self.reader.size} bytes, its superblock says {end}")
        return root

    # -- groups --------------------------------------------------------------------------------------------------------

    def walk(self, root: int) -> Iterator[HDF5Array]:
        """Every array below the root, each object once."""
        pending, seen = [("", root, 0)], {root}
        while pending:
            name, address, depth = pending.pop()
            if depth > MAX_DEPTH:
                self.refuse("cycle", f"the group {quoted(name)} is nested too deep")
            found = self.messages(address)
            kinds = {message.kind for message in found}
            if messages.LAYOUT in kinds:
                yield self.array(name, found)
                continue
            if not kinds & {messages.SYMBOL_TABLE, messages.LINK_INFO, messages.LINK, messages.GROUP_INFO}:
                self.refuse("object", f"{quoted(name)} is neither a group nor an array")
            names: set[str] = set()
            for child, where in self.children(name, found):
                if child in names:
                    self.refuse("duplicate-name", f"{quoted(name)} holds {quoted(child)} twice")
                names.add(child)
                if where in seen:
                    self.refuse(
                        "cycle",
                        f"{quoted(child)} in {quoted(name)} is an object that has another name too, or contains itself",
                    )
                seen.add(where)
                if len(seen) > MAX_OBJECTS:
                    self.refuse("too-many-objects", f"holds more than {MAX_OBJECTS} objects")
                pending.append((f"{name}/{child}" if name else child, where, depth + 1))

    def children(self, group: str, found: list[Message]) -> Iterator[tuple[str, int]]:
        """(name, address of the object header) of a group's members."""
        for message in found:
            values = Values(message.data, self.refuse)
            if message.kind == messages.SYMBOL_TABLE:
                yield from self.table(group, values.u64(), values.u64())
            elif message.kind == messages.LINK:
                yield messages.hard_link(values, group, self.refuse)
            elif message.kind == messages.LINK_INFO and messages.link_heap(values) != UNDEFINED:
                self.refuse("dense", f"the group {quoted(group)} keeps its links in a fractal heap, which is not read")

    def table(self, group: str, tree: int, heap: int) -> Iterator[tuple[str, int]]:
        """The members of a group of the old kind: a B-tree of symbol nodes [III.A.1, III.B], their names in a local heap [III.D]."""
        raw = self.signed(heap, 32, b"HEAP")
        size, _, address = struct.unpack_from("<3Q", raw, 8)
        names = self.block(address, size)
        for node in self.leaves(tree):
            count = struct.unpack_from("<H", self.signed(node, 8, b"SNOD"), 6)[0]
            entries = self.block(node + 8, 40 * count)
            for at in range(0, len(entries), 40):
                offset, where, cached = struct.unpack_from("<QQI", entries, at)
                end = names.find(b"\0", offset, offset + MAX_NAME_BYTES) if offset < size else -1
                if end < 0:
                    self.refuse("broken", f"the group {quoted(group)} has a name that does not end")
                name = self.name(names[offset:end])
                if cached == 2 or where == UNDEFINED:
                    self.refuse("link", f"{quoted(name)} in {quoted(group)} is a soft link")
                yield name, where

    def leaves(self, tree: int) -> Iterator[int]:
        """Addresses of the symbol nodes below a version 1 B-tree node of a group."""
        pending, seen = [(tree, 64)], set()
        while pending:
            address, above = pending.pop()
            if address in seen or len(seen) > MAX_NODES:
                self.refuse("broken", "a tree of names contains itself, or more nodes than there can be")
            seen.add(address)
            raw = self.signed(address, 24, b"TREE")
            kind, level, count = struct.unpack_from("<BBH", raw, 4)
            if kind != 0 or level >= above:
                self.refuse("broken", f"the tree of names at byte {address} is none")
            entries = self.block(address + 24, 16 * count + 8)
            children = [_U64.unpack_from(entries, 16 * index + 8)[0] for index in range(count)]
            if level == 0:
                yield from children
            else:
                pending += [(child, level) for child in reversed(children)]

    def name(self, raw: bytes) -> str:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            self.refuse("name", f"the name {quoted(raw)} is not UTF-8")
        if not text or "/" in text or text in (".", ".."):
            self.refuse("name", f"the name {quoted(text)} is none")
        return text

    # -- object headers [IV.A.1] ---------------------------------------------------------------------------------------

    def messages(self, address: int) -> list[Message]:
        """The messages of an object header, through all its continuation blocks."""
        head = self.block(address, min(48, max(self.reader.size - self.base - address, 0)))
        new = head.startswith(b"OHDR")
        pending = [messages.first_block(head, address, new, self.refuse)]
        found: list[Message] = []
        read = 0
        while pending:
            start, nbytes = pending.pop(0)
            read += 1
            if read > 256:
                self.refuse("broken", f"the header at byte {address} goes on and on")
            raw = self.block(start, nbytes)
            if new:
                raw = self.checked(raw, head, start, first=read == 1)
            for message in messages.parse(raw, new=new, ordered=bool(new and head[5] & 4), refuse=self.refuse):
                if message.kind == messages.CONTINUATION:
                    values = Values(message.data, self.refuse)
                    pending.append((values.u64(), values.u64()))
                else:
                    found.append(message)
        return found

    def checked(self, raw: bytes, head: bytes, start: int, *, first: bool) -> bytes:
        """The messages of a block of the new kind, whose checksum is at its end; the first block's covers the header's head."""
        if not first and not raw.startswith(b"OCHK"):
            self.refuse("broken", f"has no OCHK at byte {start}")
        body, stored = raw[:-4], raw[-4:]
        whole = head[: messages.head_size(head)] + body if first else body
        if len(stored) < 4 or messages.lookup3(whole) != struct.unpack("<I", stored)[0]:
            self.refuse("checksum", f"the object header at byte {start} is damaged")
        return body if first else body[4:]

    # -- arrays --------------------------------------------------------------------------------------------------------

    def array(self, name: str, found: list[Message]) -> HDF5Array:
        where = quoted(name)
        by_kind = {message.kind: message for message in found}
        if messages.EXTERNAL in by_kind:
            self.refuse("external", f"{where} keeps its values in another file")
        for kind in (messages.DATASPACE, messages.DATATYPE, messages.LAYOUT):
            if kind not in by_kind or by_kind[kind].shared or sum(message.kind == kind for message in found) > 1:
                self.refuse("broken", f"{where} has not exactly one shape, type and layout of its own")
        offset, size = messages.layout(by_kind[messages.LAYOUT].data, where, self.refuse)
        shape = messages.shape(by_kind[messages.DATASPACE].data, where, self.refuse)
        dtype, itemsize = messages.datatype(by_kind[messages.DATATYPE].data, where, self.refuse)
        if dtype == "OPAQUE":
            if self.attribute(found, "dtype") != b"bfloat16":
                self.refuse("dtype", f"{where} holds opaque values not marked as bfloat16, not floating-point ones")
            dtype = "BF16"
        if prod(dim for dim in shape if dim) * itemsize >= 1 << 63:
            self.refuse("overflow", f"{where}: the product of its shape {shape} overflows")
        nbytes = prod(shape) * itemsize
        if offset == UNDEFINED or nbytes == 0:
            self.refuse("empty", f"{where} has no values")
        if size != nbytes or self.base + offset + nbytes > self.reader.size:
            self.refuse("extent", f"the values of {where} do not lie inside the file")
        return HDF5Array(name, dtype, shape, self.base + offset, nbytes)

    def attribute(self, found: list[Message], name: str) -> bytes | None:
        """The text of an attribute, kept in its message or in a global heap."""
        for message in found:
            if message.kind == messages.ATTRIBUTE and not message.shared:
                value = messages.text_attribute(message.data, name, self.refuse)
                if isinstance(value, tuple):
                    return self.global_heap(*value)
                if value is not None:
                    return value
        return None

    def global_heap(self, length: int, address: int, index: int) -> bytes:
        """An object of a global heap collection [III.E]."""
        raw = self.signed(address, 16, b"GCOL")
        size = _U64.unpack_from(raw, 8)[0]
        raw, at = self.block(address, size), 16
        while at + 16 <= len(raw):
            number, nbytes = struct.unpack_from("<H6xQ", raw, at)
            if number == index and number:
                if length > nbytes or at + 16 + length > len(raw):
                    break
                return raw[at + 16 : at + 16 + length].rstrip(b"\0")
            if number == 0:
                break
            at += 16 + -(-nbytes // 8) * 8
        self.refuse("broken", f"the heap at byte {address} has not the text it should")

    def check_apart(self, arrays: dict[str, HDF5Array]) -> None:
        end, previous = 0, ""
        for array in sorted(arrays.values(), key=lambda each: each.offset):
            if array.offset < end:
                self.refuse("overlap", f"the values of {quoted(previous)} and {quoted(array.name)} overlap")
            end, previous = array.offset + array.nbytes, array.name


def refusal(kind: str, path: Path, message: str) -> InputRefused:
    return InputRefused(f"hdf5.{kind}", f"{path.name}: {message}", hint=_HINT)
