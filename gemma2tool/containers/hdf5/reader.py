"""Finds the bytes of each array in an HDF5 file of plain arrays, without libhdf5.

On damaged files libhdf5 crashes, hangs or allocates without limit, and it follows links into other files. This module
reads the small part of the format that saved weights use (HDF5 File Format Specification 3.0; sections in brackets):
superblocks 0 to 3; groups as symbol tables or link messages; contiguous arrays of IEEE floats, of integers, or of
opaque two-byte values with an attribute that says bfloat16. Everything else is refused with a message that names it:
links other than hard links, chunks and filters, external and virtual storage, other types.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from gemma2tool.containers import file_kind
from gemma2tool.containers.hdf5 import messages
from gemma2tool.containers.hdf5.messages import Message, NumberReader
from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import FileReader, open_for_reading

MAGIC = b"\x89HDF\r\n\x1a\n"
MAX_OBJECTS = 100_000
MAX_DEPTH = 32
MAX_STRUCTURE_BYTES = 64 << 20
"""Headers, tables and names together. A 27B model takes less than one million."""
MAX_BLOCK_BYTES = 1 << 20
MAX_NODES = 20_000
MAX_HEADER_BLOCKS = 256
MAX_NAME_BYTES = 4096
UNDEFINED = (1 << 64) - 1
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class HDF5Array:
    """The place of an array. ``offset`` is from the start of the file; ``dtype``: safetensors' name (F32, BF16, I8)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_arrays(path: str | os.PathLike[str]) -> dict[str, HDF5Array]:
    """Reads the arrays of a file by their full names ("layers/.../vars/0"). Raises InputRefused (``hdf5.*``).

    Every array is inside the file, and no two overlap.
    """
    with open_for_reading(path) as reader:
        file = _File(reader)
        arrays = {array.name: array for array in file.walk(file.root())}
        file.refuse_overlaps(arrays)
        return arrays


class _File:
    """The structure of a file, read block by block up to a total of ``MAX_STRUCTURE_BYTES``."""

    def __init__(self, reader: FileReader) -> None:
        self.reader = reader
        self.budget = MAX_STRUCTURE_BYTES
        self.base = 0

    def refusal(self, kind: str, message: str) -> InputRefused:
        return refusal(kind, self.reader.path, message)

    def block(self, address: int, nbytes: int) -> bytes:
        """Reads ``nbytes`` bytes at an address, which is relative to the superblock's base."""
        at = self.base + address
        if address == UNDEFINED or nbytes > MAX_BLOCK_BYTES or at + nbytes > self.reader.size:
            raise self.refusal("broken", f"refers to {nbytes} bytes at byte {at}, which do not exist or are too many")
        self.budget -= nbytes
        if self.budget < 0:
            raise self.refusal("too-many-objects", f"has more than {MAX_STRUCTURE_BYTES} bytes of structure")
        return bytes(self.reader.pread(at, nbytes))

    def signed(self, address: int, nbytes: int, signature: bytes) -> bytes:
        raw = self.block(address, nbytes)
        if not raw.startswith(signature):
            raise self.refusal("broken", f"has no {signature.decode()} at byte {self.base + address}")
        return raw

    # -- superblock [II.A] ---------------------------------------------------------------------------------------------

    def root(self) -> int:
        """The address of the root group's object header."""
        if self.reader.size < 48 or self.reader.pread(0, 8) != MAGIC:
            file_kind.refuse_foreign(self.reader, "hdf5")
            raise self.refusal("magic", "is not an HDF5 file")
        raw = bytes(self.reader.pread(0, min(96 + 4, self.reader.size)))
        version = raw[8]
        if version > 3:
            raise self.refusal("superblock", f"has a superblock of version {version}; only versions 0 to 3 are read")
        sizes = raw[13:15] if version < 2 else raw[9:11]
        if sizes != b"\x08\x08":
            raise self.refusal(
                "superblock", f"has offsets of {sizes[0]} bytes and lengths of {sizes[1]} bytes; only 8 and 8 are read"
            )
        start = (24 if version == 0 else 28) if version < 2 else 12
        if len(raw) < start + 32 + (40 if version < 2 else 4):
            raise self.refusal("broken", "ends inside its superblock")
        base, extra, end, last = struct.unpack_from("<4Q", raw, start)
        if version < 2:
            _, root = struct.unpack_from("<2Q", raw, start + 32)
            driver = last
        else:
            root, driver = last, UNDEFINED
            if messages.lookup3(raw[: start + 32]) != struct.unpack_from("<I", raw, start + 32)[0]:
                raise self.refusal("checksum", "the checksum of its superblock does not match")
        if base != 0 or driver != UNDEFINED or extra != UNDEFINED:
            raise self.refusal("superblock", "has a user block, a driver or a superblock extension")
        if end > self.reader.size:
            raise self.refusal("truncated", f"has {self.reader.size} bytes, but its superblock says {end}")
        return int(root)

    # -- groups --------------------------------------------------------------------------------------------------------

    def walk(self, root: int) -> Iterator[HDF5Array]:
        """Yields every array below the root, visiting each object once."""
        pending, seen = [("", root, 0)], {root}
        while pending:
            name, address, depth = pending.pop()
            if depth > MAX_DEPTH:
                raise self.refusal("cycle", f"the group {quoted(name)} is nested more than {MAX_DEPTH} deep")
            header = self.messages(address)
            kinds = {message.kind for message in header}
            if messages.LAYOUT in kinds:
                yield self.array(name, header)
                continue
            if not kinds & {messages.SYMBOL_TABLE, messages.LINK_INFO, messages.LINK, messages.GROUP_INFO}:
                raise self.refusal("object", f"{quoted(name)} is neither a group nor an array")
            names: set[str] = set()
            for child, child_address in self.children(name, header):
                if child in names:
                    raise self.refusal("duplicate-name", f"{quoted(name)} contains {quoted(child)} twice")
                names.add(child)
                if child_address in seen:
                    raise self.refusal(
                        "cycle",
                        f"{quoted(child)} in {quoted(name)} is an object that has a second name or contains itself",
                    )
                seen.add(child_address)
                if len(seen) > MAX_OBJECTS:
                    raise self.refusal("too-many-objects", f"contains more than {MAX_OBJECTS} objects")
                pending.append((f"{name}/{child}" if name else child, child_address, depth + 1))

    def children(self, group: str, header: list[Message]) -> Iterator[tuple[str, int]]:
        """Yields (name, address of the object header) for each member of a group."""
        for message in header:
            numbers = NumberReader(message.data, self.refusal)
            if message.kind == messages.SYMBOL_TABLE:
                yield from self.table(group, numbers.u64(), numbers.u64())
            elif message.kind == messages.LINK:
                yield messages.hard_link(numbers, group, self.refusal)
            elif message.kind == messages.LINK_INFO and messages.link_heap(numbers) != UNDEFINED:
                raise self.refusal(
                    "dense", f"the group {quoted(group)} stores its links in a fractal heap, which is not supported"
                )

    def table(self, group: str, tree: int, heap: int) -> Iterator[tuple[str, int]]:
        """The members of a group with a symbol table: a B-tree of symbol nodes [III.A.1, III.B], names in a local heap
        [III.D].
        """
        raw = self.signed(heap, 32, b"HEAP")
        size, _, names_address = struct.unpack_from("<3Q", raw, 8)
        names = self.block(names_address, size)
        for node in self.leaves(tree):
            count = struct.unpack_from("<H", self.signed(node, 8, b"SNOD"), 6)[0]
            entries = self.block(node + 8, 40 * count)
            for at in range(0, len(entries), 40):
                offset, address, cached = struct.unpack_from("<QQI", entries, at)
                end = names.find(b"\0", offset, offset + MAX_NAME_BYTES) if offset < size else -1
                if end < 0:
                    raise self.refusal("broken", f"the group {quoted(group)} has a name that does not end")
                name = self.name(names[offset:end])
                if cached == 2 or address == UNDEFINED:
                    raise self.refusal("link", f"{quoted(name)} in {quoted(group)} is a soft link")
                yield name, address

    def leaves(self, tree: int) -> Iterator[int]:
        """Yields the addresses of the symbol nodes below a version 1 B-tree node of a group."""
        pending: list[tuple[int, int]] = [(tree, 64)]
        seen: set[int] = set()
        while pending:
            address, parent_level = pending.pop()
            if address in seen or len(seen) > MAX_NODES:
                raise self.refusal("broken", f"a tree of names contains itself, or has more than {MAX_NODES} nodes")
            seen.add(address)
            raw = self.signed(address, 24, b"TREE")
            kind, level, count = struct.unpack_from("<BBH", raw, 4)
            if kind != 0 or level >= parent_level:
                raise self.refusal("broken", f"the node at byte {address} is not a valid node of a tree of names")
            entries = self.block(address + 24, 16 * count + 8)
            children = [_U64.unpack_from(entries, 16 * index + 8)[0] for index in range(count)]
            if level == 0:
                yield from children
            else:
                pending += [(child, level) for child in reversed(children)]

    def name(self, raw: bytes) -> str:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refusal("name", f"the name {quoted(raw)} is not UTF-8") from error
        if not text or "/" in text or text in (".", ".."):
            raise self.refusal("name", f"the name {quoted(text)} is not a plain name")
        return text

    # -- object headers [IV.A.1] ---------------------------------------------------------------------------------------

    def messages(self, address: int) -> list[Message]:
        """Reads the messages of an object header, including its continuation blocks."""
        head = self.block(address, min(48, max(self.reader.size - self.base - address, 0)))
        new = head.startswith(b"OHDR")
        pending = [messages.first_block(head, address, new, self.refusal)]
        header: list[Message] = []
        blocks = 0
        while pending:
            start, nbytes = pending.pop(0)
            blocks += 1
            if blocks > MAX_HEADER_BLOCKS:
                raise self.refusal(
                    "broken", f"the object header at byte {address} has more than {MAX_HEADER_BLOCKS} blocks"
                )
            raw = self.block(start, nbytes)
            if new:
                raw = self.checked(raw, head, start, first=blocks == 1)
            for message in messages.parse(raw, new=new, ordered=bool(new and head[5] & 4), refusal=self.refusal):
                if message.kind == messages.CONTINUATION:
                    numbers = NumberReader(message.data, self.refusal)
                    pending.append((numbers.u64(), numbers.u64()))
                else:
                    header.append(message)
        return header

    def checked(self, raw: bytes, head: bytes, start: int, *, first: bool) -> bytes:
        """The messages of a version 2 block, which ends with a checksum.

        That of the first block covers the head of the header.
        """
        if not first and not raw.startswith(b"OCHK"):
            raise self.refusal("broken", f"has no OCHK at byte {start}")
        body, stored = raw[:-4], raw[-4:]
        whole = head[: messages.head_size(head)] + body if first else body
        if len(stored) < 4 or messages.lookup3(whole) != struct.unpack("<I", stored)[0]:
            raise self.refusal("checksum", f"the checksum of the object header at byte {start} does not match")
        return body if first else body[4:]

    # -- arrays --------------------------------------------------------------------------------------------------------

    def array(self, name: str, header: list[Message]) -> HDF5Array:
        where = quoted(name)
        by_kind = {message.kind: message for message in header}
        if messages.EXTERNAL in by_kind:
            raise self.refusal("external", f"{where} stores its values in another file")
        for kind in (messages.DATASPACE, messages.DATATYPE, messages.LAYOUT):
            if kind not in by_kind or by_kind[kind].shared or sum(message.kind == kind for message in header) > 1:
                raise self.refusal("broken", f"{where} does not have exactly one shape, one type and one layout")
        offset, size = messages.layout(by_kind[messages.LAYOUT].data, where, self.refusal)
        shape = messages.shape(by_kind[messages.DATASPACE].data, where, self.refusal)
        dtype, itemsize = messages.datatype(by_kind[messages.DATATYPE].data, where, self.refusal)
        if dtype == "OPAQUE":
            if self.attribute(header, "dtype") != b"bfloat16":
                raise self.refusal("dtype", f"{where} contains opaque values that are not marked as bfloat16")
            dtype = "BF16"
        if prod(dim for dim in shape if dim) * itemsize >= 1 << 63:
            raise self.refusal("overflow", f"{where}: the product of its shape {shape} overflows")
        nbytes = prod(shape) * itemsize
        if offset == UNDEFINED or nbytes == 0:
            raise self.refusal("empty", f"{where} has no values")
        if size != nbytes or self.base + offset + nbytes > self.reader.size:
            raise self.refusal("extent", f"the values of {where} extend beyond the file, or have the wrong size")
        return HDF5Array(name, dtype, shape, self.base + offset, nbytes)

    def attribute(self, header: list[Message], name: str) -> bytes | None:
        """The text of an attribute, from its message or a global heap; None if there is none."""
        for message in header:
            if message.kind == messages.ATTRIBUTE and not message.shared:
                value = messages.text_attribute(message.data, name, self.refusal)
                if isinstance(value, tuple):
                    return self.global_heap(*value)
                if value is not None:
                    return value
        return None

    def global_heap(self, length: int, address: int, index: int) -> bytes:
        """Reads an object of a global heap collection [III.E]."""
        raw = self.signed(address, 16, b"GCOL")
        raw, at = self.block(address, _U64.unpack_from(raw, 8)[0]), 16
        while at + 16 <= len(raw):
            number, nbytes = struct.unpack_from("<H6xQ", raw, at)
            if number == index and number:
                if length > nbytes or at + 16 + length > len(raw):
                    break
                return raw[at + 16 : at + 16 + length].rstrip(b"\0")
            if number == 0:
                break
            at += 16 + -(-nbytes // 8) * 8
        raise self.refusal("broken", f"the heap at byte {address} lacks the expected string")

    def refuse_overlaps(self, arrays: dict[str, HDF5Array]) -> None:
        end, previous = 0, ""
        for array in sorted(arrays.values(), key=lambda array: array.offset):
            if array.offset < end:
                raise self.refusal("overlap", f"the values of {quoted(previous)} and {quoted(array.name)} overlap")
            end, previous = array.offset + array.nbytes, array.name


def refusal(kind: str, path: Path, message: str) -> InputRefused:
    return InputRefused(f"hdf5.{kind}", f"{path.name}: {message}")
