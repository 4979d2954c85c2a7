"""OCDBT databases (Orbax's key-value store): where each key's value lies, found without tensorstore.

Source: tensorstore ``kvstore/ocdbt/index.rst``, "Storage format". A manifest names the root of a B+tree of the newest version; its
nodes lie in data files, compressed with zstandard, each with a CRC-32C. Every path that a node names is confined to the database's
folder, every size is bounded before it is allocated, and no node is read twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from gemma2tool.errors import InputRefused
from gemma2tool.storage.crc import crc32c
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import open_for_reading, read_whole

MANIFEST = "manifest.ocdbt"
MAX_MANIFEST_BYTES = 1 << 20
MAX_NODE_BYTES = 8 << 20
"""A node decoded; tensorstore's own default limit for those it writes."""
MAX_TREE_BYTES = 6 << 20
"""All nodes as stored; those of a 27B checkpoint take well under one million."""
MAX_DECODED_BYTES = 48 << 20
MAX_ENTRIES = 200_000
MAX_HEIGHT = 16
MAX_FILES = 100_000
MAX_KEY_BYTES = 4096
MAX_PATH_BYTES = 1024
_MANIFEST_MAGIC, _NODE_MAGIC = bytes.fromhex("0cdb3a2a"), bytes.fromhex("0cdb20de")
_HINT = "the checkpoint is damaged or incomplete: fetch it again"

Decompress = Callable[[bytes, int], bytes]
"""(a zstandard frame, the most bytes that may come of it) to those bytes; raises ValueError for anything else."""


@dataclass(frozen=True, slots=True)
class StoredValue:
    """A key's value: ``nbytes`` bytes of a file from ``offset`` on, or, where ``path`` is None, the bytes ``inline``."""

    path: Path | None
    offset: int
    nbytes: int
    inline: bytes = b""


@dataclass(frozen=True, slots=True)
class _Node:
    path: str
    offset: int
    nbytes: int
    height: int
    base: str
    prefix: bytes


def read_entries(folder: Path, decompress: Decompress) -> dict[str, StoredValue]:
    """The newest values of a database by key. Raises InputRefused (``ocdbt.*``)."""
    return _Database(folder, decompress).entries()


class _Database:
    def __init__(self, folder: Path, decompress: Decompress) -> None:
        self.folder, self.decompress = folder, decompress
        self.stored = self.decoded = 0
        self.sizes: dict[str, int] = {}

    def refuse(self, kind: str, message: str) -> NoReturn:
        raise InputRefused(f"ocdbt.{kind}", f"{self.folder.name}: {message}", hint=_HINT)

    def entries(self) -> dict[str, StoredValue]:
        raw = read_whole(self.folder / MANIFEST, what=MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
        root = self.newest(_Reader(self.body(raw, _MANIFEST_MAGIC, MANIFEST), self.refuse))
        values: dict[str, StoredValue] = {}
        pending, seen = [root] if root else [], set()
        while pending:
            node = pending.pop()
            if (node.path, node.offset) in seen:
                self.refuse(
                    "tree", f"a node of the tree at byte {node.offset} of {quoted(node.path)} belongs to it twice"
                )
            seen.add((node.path, node.offset))
            if len(seen) + len(pending) > MAX_ENTRIES:
                self.refuse("too-many-entries", f"has more than {MAX_ENTRIES} nodes")
            pending += self.node(node, values)
        return values

    def body(self, raw: bytes, magic: bytes, where: str) -> bytes:
        """What is between the header and the checksum of a manifest or node, decompressed."""
        if len(raw) < 18 or raw[:4] != magic:
            self.refuse("magic", f"{where} is not one of OCDBT's")
        if int.from_bytes(raw[4:12], "little") != len(raw):
            self.refuse(
                "length", f"{where} has {len(raw)} bytes, its header says {int.from_bytes(raw[4:12], 'little')}"
            )
        if crc32c(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
            self.refuse("checksum", f"{where} is damaged")
        version, compression = raw[12], raw[13]
        if version != 0 or compression > 1:
            self.refuse("version", f"{where} is of version {version}, compressed in the way {compression}")
        body = raw[14:-4]
        if compression:
            try:
                body = self.decompress(body, MAX_NODE_BYTES)
            except ValueError as error:
                self.refuse("compression", f"{where} cannot be decompressed: {error}")
        self.decoded += len(body)
        if self.decoded > MAX_DECODED_BYTES:
            self.refuse("too-large", f"its tree takes more than {MAX_DECODED_BYTES} bytes")
        return body

    # -- the manifest --------------------------------------------------------------------------------------------------

    def newest(self, reader: _Reader) -> _Node | None:
        """The root of the newest version; None for an empty database."""
        reader.take(16)  # uuid
        if reader.varint() != 0:
            self.refuse("manifest", "keeps its manifest in several files, which are not read")
        reader.varint()  # max_inline_value_bytes
        reader.varint()  # max_decoded_node_bytes
        reader.u8()  # version_tree_arity_log2
        method = reader.varint()
        if method > 1:
            self.refuse("manifest", f"compresses in the way {method}")
        if method:
            reader.take(4)
        files = self.files(reader, "")
        count = reader.count(1)
        if not count:
            self.refuse("manifest", "has no version")
        generations = reader.varints(count)
        heights = list(reader.take(count))
        places = list(zip(reader.varints(count), reader.varints(count), reader.varints(count), strict=True))
        keys = reader.varints(count)
        if sorted(set(generations)) != generations:
            self.refuse("manifest", "its versions are out of order")
        file, offset, nbytes = places[-1]
        if keys[-1] == 0 and nbytes in (0, (1 << 64) - 1):
            return None
        if heights[-1] > MAX_HEIGHT:
            self.refuse("tree", f"its tree is {heights[-1]} nodes high")
        path, base = self.file(files, file)
        return _Node(path, offset, nbytes, heights[-1], base, b"")

    # -- data files ----------------------------------------------------------------------------------------------------

    def files(self, reader: _Reader, transitive: str) -> list[tuple[str, str]]:
        """(path from the folder, its base) of the data files that a node refers to by number."""
        count = reader.count(2)
        if count > MAX_FILES:
            self.refuse("too-many-files", f"refers to {count} files from one node")
        prefixes = [0, *reader.varints(max(count - 1, 0))]
        suffixes, bases = reader.varints(count), reader.varints(count)
        found: list[tuple[str, str]] = []
        previous = b""
        for prefix, suffix, base in zip(prefixes, suffixes, bases, strict=False):
            if prefix > len(previous) or suffix > MAX_PATH_BYTES or base > prefix + suffix:
                self.refuse("path", "a table of files is broken")
            previous = previous[:prefix] + reader.take(suffix)
            full = transitive.encode() + previous
            # An empty version of a database has no root, and "no file" in its place.
            if previous and (len(full) > MAX_PATH_BYTES or not _is_plain(full)):
                self.refuse("path", f"refers to the file {quoted(full)}, which is no plain path inside it")
            found.append((full.decode(), full[: len(transitive) + base].decode()))
        return found

    def file(self, files: list[tuple[str, str]], number: int) -> tuple[str, str]:
        if number >= len(files) or not files[number][0]:
            self.refuse("path", f"refers to the file number {number} of {len(files)}, which is none")
        return files[number]

    def size(self, path: str) -> int:
        """The size of a data file, reached without following a link."""
        if path not in self.sizes:
            place = self.folder
            for part in path.split("/"):
                place = place / part
                if place.is_symlink():
                    self.refuse("link", f"{quoted(path)} inside it is a symbolic link, or leads through one")
            with open_for_reading(place) as reader:
                self.sizes[path] = reader.size
        return self.sizes[path]

    def inside(self, path: str, offset: int, nbytes: int) -> None:
        if offset + nbytes > self.size(path):
            self.refuse(
                "extent",
                f"refers to bytes {offset} to {offset + nbytes} of {quoted(path)}, which has {self.size(path)}",
            )

    # -- the tree ------------------------------------------------------------------------------------------------------

    def node(self, node: _Node, values: dict[str, StoredValue]) -> list[_Node]:
        """Reads a node: the values of a leaf are added to ``values``, the children of another returned."""
        self.inside(node.path, node.offset, node.nbytes)
        self.stored += node.nbytes
        if self.stored > MAX_TREE_BYTES:
            self.refuse("too-large", f"its tree takes more than {MAX_TREE_BYTES} bytes")
        with open_for_reading(self.folder / node.path) as file:
            raw = bytes(file.pread(node.offset, node.nbytes))
        reader = _Reader(self.body(raw, _NODE_MAGIC, f"a node in {quoted(node.path)}"), self.refuse)
        if reader.u8() != node.height:
            self.refuse("tree", "a node of its tree has another height than it should")
        files = self.files(reader, node.base)
        count = reader.count(4)
        if len(values) + count > MAX_ENTRIES:
            self.refuse("too-many-entries", f"holds more than {MAX_ENTRIES} keys")
        prefixes = [0, *reader.varints(max(count - 1, 0))]
        suffixes = reader.varints(count)
        common = reader.varints(count) if node.height else suffixes
        keys: list[bytes] = []
        previous = b""
        for prefix, suffix in zip(prefixes, suffixes, strict=False):
            if prefix > len(previous) or len(node.prefix) + prefix + suffix > MAX_KEY_BYTES:
                self.refuse("key", "a key is too long or its prefix longer than the one before it")
            previous = previous[:prefix] + reader.take(suffix)
            keys.append(previous)
        if any(a >= b for a, b in pairwise(keys)):
            self.refuse("key", "the keys of a node are out of order")
        if node.height:
            return self.children(node, reader, files, keys, common)
        self.leaf(node, reader, files, keys, values)
        return []

    def children(self, node: _Node, reader: _Reader, files: list, keys: list[bytes], common: list[int]) -> list[_Node]:
        count = len(keys)
        places = list(zip(reader.varints(count), reader.varints(count), reader.varints(count), strict=True))
        found = []
        for key, shared, (number, offset, nbytes) in zip(keys, common, places, strict=True):
            if shared > len(key):
                self.refuse("key", "a node's common prefix is longer than its key")
            path, base = self.file(files, number)
            found.append(_Node(path, offset, nbytes, node.height - 1, base, node.prefix + key[:shared]))
        return found

    def leaf(
        self, node: _Node, reader: _Reader, files: list, keys: list[bytes], values: dict[str, StoredValue]
    ) -> None:
        lengths, kinds = reader.varints(len(keys)), reader.take(len(keys))
        if kinds.strip(b"\0\1"):
            self.refuse("tree", "a value is kept in an unknown way")
        elsewhere = [index for index, kind in enumerate(kinds) if kind]
        numbers, offsets = reader.varints(len(elsewhere)), reader.varints(len(elsewhere))
        found: dict[int, StoredValue] = {}
        for index, number, offset in zip(elsewhere, numbers, offsets, strict=True):
            path, _ = self.file(files, number)
            self.inside(path, offset, lengths[index])
            found[index] = StoredValue(self.folder / path, offset, lengths[index])
        for index, key in enumerate(keys):
            if index not in found:
                found[index] = StoredValue(None, 0, lengths[index], reader.take(lengths[index]))
            try:
                name = (node.prefix + key).decode("utf-8")
            except UnicodeDecodeError:
                self.refuse("key", f"the key {quoted(key)} is not UTF-8")
            if name in values:
                self.refuse("key", f"the key {quoted(name)} appears twice")
            values[name] = found[index]
        if not reader.done:
            self.refuse("tree", "a node of its tree has bytes left over")


def _is_plain(path: bytes) -> bool:
    """Whether a path is relative, of plain segments, none of them ``..``."""
    if not path.isascii() or not path.decode().isprintable() or b"\\" in path or b":" in path:
        return False
    return all(segment not in (b"", b".", b"..") for segment in path.split(b"/"))


class _Reader:
    """The fields of a decoded node, one after another."""

    def __init__(self, data: bytes, refuse: Callable[[str, str], NoReturn]) -> None:
        self.data, self.refuse, self.at = data, refuse, 0

    @property
    def done(self) -> bool:
        return self.at == len(self.data)

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            self.refuse("truncated", "a manifest or node ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def u8(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        result = shift = 0
        while True:
            byte = self.u8()
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                if result >= 1 << 64:
                    self.refuse("truncated", "a number of a manifest or node is longer than 64 bits")
                return result
            shift += 7
            if shift > 63:
                self.refuse("truncated", "a number of a manifest or node does not end")

    def varints(self, count: int) -> list[int]:
        return [self.varint() for _ in range(count)]

    def count(self, least: int) -> int:
        """A number of items of which each takes ``least`` bytes or more."""
        count = self.varint()
        if count * least > len(self.data) - self.at:
            self.refuse("truncated", f"a manifest or node says it lists {count} items, more than it has bytes for")
        return count
