"""Finds the value of each key in an OCDBT database (Orbax's key-value store), without tensorstore.

Source: tensorstore ``kvstore/ocdbt/index.rst``, "Storage format". A manifest names the root of the B+tree of the newest
version. Its nodes are in data files, compressed with zstandard, each with a CRC-32C. Every path in a node is confined
to the database's folder, every size is checked before anything is allocated, and no node is read twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from gemma2tool.errors import InputRefused
from gemma2tool.storage.crc import crc32c
from gemma2tool.storage.paths import leads_to_blob
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import open_for_reading, read_whole

MANIFEST = "manifest.ocdbt"
MAX_MANIFEST_BYTES = 1 << 20
MAX_NODE_BYTES = 8 << 20
"""One decoded node. Also the default limit of what tensorstore writes."""
MAX_TREE_BYTES = 6 << 20
"""All nodes as stored. Those of a 27B checkpoint take well under one million."""
MAX_DECODED_BYTES = 48 << 20
MAX_ENTRIES = 200_000
MAX_HEIGHT = 16
MAX_FILES = 100_000
MAX_KEY_BYTES = 4096
MAX_PATH_BYTES = 1024
_MANIFEST_MAGIC, _NODE_MAGIC = bytes.fromhex("0cdb3a2a"), bytes.fromhex("0cdb20de")

Decompress = Callable[[bytes, int], bytes]
"""Decompresses (a zstandard frame, at most this many bytes). Raises ValueError if it cannot."""


@dataclass(frozen=True, slots=True)
class StoredValue:
    """The value of a key: ``nbytes`` bytes of a file, starting at ``offset``; or the bytes ``inline`` if ``path`` is
    None.
    """

    path: Path | None
    offset: int
    nbytes: int
    inline: bytes = b""


Files = list[tuple[str, str]]
"""(path from the database's folder, base path) of data files, by number."""


@dataclass(frozen=True, slots=True)
class _Node:
    """Where a node is stored. ``base`` is prepended to the paths in it, ``prefix`` to its keys."""

    path: str
    offset: int
    nbytes: int
    height: int
    base: str
    prefix: bytes


def read_entries(folder: Path, decompress: Decompress) -> dict[str, StoredValue]:
    """Reads the newest values of a database by key. Raises InputRefused (``ocdbt.*``)."""
    return _Database(folder, decompress).entries()


class _Database:
    def __init__(self, folder: Path, decompress: Decompress) -> None:
        self.folder, self.decompress = folder, decompress
        self.stored = self.decoded = 0
        self.sizes: dict[str, int] = {}

    def refusal(self, kind: str, message: str) -> InputRefused:
        return InputRefused(f"ocdbt.{kind}", f"{self.folder.name}: {message}")

    def entries(self) -> dict[str, StoredValue]:
        raw = read_whole(self.folder / MANIFEST, what=MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
        root = self.newest(_Reader(self.body(raw, _MANIFEST_MAGIC, MANIFEST), self.refusal))
        values: dict[str, StoredValue] = {}
        pending = [root] if root else []
        seen: set[tuple[str, int]] = set()
        while pending:
            node = pending.pop()
            if (node.path, node.offset) in seen:
                raise self.refusal(
                    "tree", f"the node at byte {node.offset} of {quoted(node.path)} appears twice in the tree"
                )
            seen.add((node.path, node.offset))
            if len(seen) + len(pending) > MAX_ENTRIES:
                raise self.refusal("too-many-entries", f"has more than {MAX_ENTRIES} nodes")
            pending += self.node(node, values)
        return values

    def body(self, raw: bytes, magic: bytes, where: str) -> bytes:
        """The decompressed bytes between the header and the checksum of a manifest or node."""
        if len(raw) < 18 or raw[:4] != magic:
            raise self.refusal("magic", f"{where} is not an OCDBT manifest or node")
        length = int.from_bytes(raw[4:12], "little")
        if length != len(raw):
            raise self.refusal("length", f"{where} has {len(raw)} bytes, but its header says {length}")
        if crc32c(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
            raise self.refusal("checksum", f"the checksum of {where} does not match")
        version, compression = raw[12], raw[13]
        if version != 0 or compression > 1:
            raise self.refusal(
                "version",
                f"{where} has version {version} and compression method {compression}, which are not supported",
            )
        body = raw[14:-4]
        if compression:
            try:
                body = self.decompress(body, MAX_NODE_BYTES)
            except ValueError as error:
                raise self.refusal("compression", f"{where} cannot be decompressed: {error}") from error
        self.decoded += len(body)
        if self.decoded > MAX_DECODED_BYTES:
            raise self.refusal("too-large", f"its tree takes more than {MAX_DECODED_BYTES} bytes")
        return body

    # -- the manifest --------------------------------------------------------------------------------------------------

    def newest(self, reader: _Reader) -> _Node | None:
        """The root of the newest version, or None for an empty database."""
        reader.take(16)  # uuid
        if reader.varint() != 0:
            raise self.refusal("manifest", "has a manifest in several files, which is not supported")
        reader.varint()  # max_inline_value_bytes
        reader.varint()  # max_decoded_node_bytes
        reader.u8()  # version_tree_arity_log2
        method = reader.varint()
        if method > 1:
            raise self.refusal("manifest", f"has compression method {method}, which is not supported")
        if method:
            reader.take(4)
        files = self.files(reader, "")
        count = reader.count(1)
        if not count:
            raise self.refusal("manifest", "contains no version")
        generations = reader.varints(count)
        heights = list(reader.take(count))
        places = list(zip(reader.varints(count), reader.varints(count), reader.varints(count), strict=True))
        keys = reader.varints(count)
        if sorted(set(generations)) != generations:
            raise self.refusal("manifest", "its versions are out of order")
        file, offset, nbytes = places[-1]
        if keys[-1] == 0 and nbytes in (0, (1 << 64) - 1):
            return None
        if heights[-1] > MAX_HEIGHT:
            raise self.refusal("tree", f"its tree has height {heights[-1]}; at most {MAX_HEIGHT} is accepted")
        path, base = self.file(files, file)
        return _Node(path, offset, nbytes, heights[-1], base, b"")

    # -- data files ----------------------------------------------------------------------------------------------------

    def files(self, reader: _Reader, transitive: str) -> Files:
        """Reads (path from the folder, base path) of the data files that a node refers to by number."""
        count = reader.count(2)
        if count > MAX_FILES:
            raise self.refusal("too-many-files", f"refers to {count} files from one node")
        prefixes = [0, *reader.varints(max(count - 1, 0))]
        suffixes, bases = reader.varints(count), reader.varints(count)
        files: Files = []
        previous = b""
        for prefix, suffix, base in zip(prefixes, suffixes, bases, strict=False):
            if prefix > len(previous) or suffix > MAX_PATH_BYTES or base > prefix + suffix:
                raise self.refusal("path", "a table of files has impossible lengths")
            previous = previous[:prefix] + reader.take(suffix)
            full = transitive.encode() + previous
            # An empty version has no root and an empty path in its place.
            if previous and (len(full) > MAX_PATH_BYTES or not _is_plain(full)):
                raise self.refusal("path", f"refers to the file {quoted(full)}, which is not a plain path inside it")
            files.append((full.decode(), full[: len(transitive) + base].decode()))
        return files

    def file(self, files: Files, number: int) -> tuple[str, str]:
        if number >= len(files) or not files[number][0]:
            raise self.refusal(
                "path", f"refers to file number {number}, but lists {len(files)} files, or its path is empty"
            )
        return files[number]

    def size(self, path: str) -> int:
        """The size of a data file. Links are not followed, but for those of the Hugging Face hub's cache."""
        if path not in self.sizes:
            full = self.folder
            for part in path.split("/"):
                full = full / part
                if full.is_symlink() and not leads_to_blob(full):
                    raise self.refusal("link", f"the file {quoted(path)} is a symbolic link, or is reached through one")
            with open_for_reading(full) as reader:
                self.sizes[path] = reader.size
        return self.sizes[path]

    def refuse_outside(self, path: str, offset: int, nbytes: int) -> None:
        if offset + nbytes > self.size(path):
            raise self.refusal(
                "extent",
                f"refers to bytes {offset} to {offset + nbytes} of {quoted(path)}, which has {self.size(path)} bytes",
            )

    # -- the tree ------------------------------------------------------------------------------------------------------

    def node(self, node: _Node, values: dict[str, StoredValue]) -> list[_Node]:
        """Reads a node. Adds the values of a leaf to ``values``; returns the children of an inner node."""
        self.refuse_outside(node.path, node.offset, node.nbytes)
        self.stored += node.nbytes
        if self.stored > MAX_TREE_BYTES:
            raise self.refusal("too-large", f"its tree takes more than {MAX_TREE_BYTES} bytes")
        with open_for_reading(self.folder / node.path) as file:
            raw = bytes(file.pread(node.offset, node.nbytes))
        reader = _Reader(self.body(raw, _NODE_MAGIC, f"a node in {quoted(node.path)}"), self.refusal)
        if reader.u8() != node.height:
            raise self.refusal("tree", "the height of a node is not one less than that of its parent")
        files = self.files(reader, node.base)
        count = reader.count(4)
        if len(values) + count > MAX_ENTRIES:
            raise self.refusal("too-many-entries", f"contains more than {MAX_ENTRIES} keys")
        prefixes = [0, *reader.varints(max(count - 1, 0))]
        suffixes = reader.varints(count)
        common = reader.varints(count) if node.height else suffixes
        keys: list[bytes] = []
        previous = b""
        for prefix, suffix in zip(prefixes, suffixes, strict=False):
            if prefix > len(previous) or len(node.prefix) + prefix + suffix > MAX_KEY_BYTES:
                raise self.refusal("key", "a key is too long, or its shared prefix is longer than the previous key")
            previous = previous[:prefix] + reader.take(suffix)
            keys.append(previous)
        if any(key >= following for key, following in pairwise(keys)):
            raise self.refusal("key", "the keys of a node are not in order")
        if node.height:
            return self.children(node, reader, files, keys, common)
        self.leaf(node, reader, files, keys, values)
        return []

    def children(self, node: _Node, reader: _Reader, files: Files, keys: list[bytes], common: list[int]) -> list[_Node]:
        count = len(keys)
        places = list(zip(reader.varints(count), reader.varints(count), reader.varints(count), strict=True))
        children = []
        for key, shared, (number, offset, nbytes) in zip(keys, common, places, strict=True):
            if shared > len(key):
                raise self.refusal("key", "a node's common prefix is longer than its key")
            path, base = self.file(files, number)
            children.append(_Node(path, offset, nbytes, node.height - 1, base, node.prefix + key[:shared]))
        return children

    def leaf(
        self, node: _Node, reader: _Reader, files: Files, keys: list[bytes], values: dict[str, StoredValue]
    ) -> None:
        lengths, kinds = reader.varints(len(keys)), reader.take(len(keys))
        if kinds.strip(b"\0\1"):
            raise self.refusal("tree", "a value is stored in an unknown way")
        in_files = [index for index, kind in enumerate(kinds) if kind]
        numbers, offsets = reader.varints(len(in_files)), reader.varints(len(in_files))
        stored: dict[int, StoredValue] = {}
        for index, number, offset in zip(in_files, numbers, offsets, strict=True):
            path, _ = self.file(files, number)
            self.refuse_outside(path, offset, lengths[index])
            stored[index] = StoredValue(self.folder / path, offset, lengths[index])
        for index, key in enumerate(keys):
            if index not in stored:
                stored[index] = StoredValue(None, 0, lengths[index], reader.take(lengths[index]))
            try:
                name = (node.prefix + key).decode("utf-8")
            except UnicodeDecodeError as error:
                raise self.refusal("key", f"the key {quoted(key)} is not UTF-8") from error
            if name in values:
                raise self.refusal("key", f"the key {quoted(name)} appears twice")
            values[name] = stored[index]
        if not reader.done:
            raise self.refusal("tree", "a leaf of its tree has bytes left over")


def _is_plain(path: bytes) -> bool:
    """Whether a path is relative and consists of plain segments other than ``.`` and ``..``."""
    if not path.isascii() or not path.decode().isprintable() or b"\\" in path or b":" in path:
        return False
    return all(segment not in (b"", b".", b"..") for segment in path.split(b"/"))


class _Reader:
    """Reads the fields of a decoded manifest or node."""

    def __init__(self, data: bytes, refusal: Callable[[str, str], InputRefused]) -> None:
        self.data, self.refusal, self.at = data, refusal, 0

    @property
    def done(self) -> bool:
        return self.at == len(self.data)

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self.refusal("truncated", "a manifest or node is truncated")
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
                    raise self.refusal("truncated", "a number in a manifest or node has more than 64 bits")
                return result
            shift += 7
            if shift > 63:
                raise self.refusal("truncated", "a number in a manifest or node does not end")

    def varints(self, count: int) -> list[int]:
        return [self.varint() for _ in range(count)]

    def count(self, min_bytes: int) -> int:
        """Reads a number of items that each take at least ``min_bytes`` bytes."""
        count = self.varint()
        if count * min_bytes > len(self.data) - self.at:
            raise self.refusal(
                "truncated", f"a manifest or node has a count of {count} items, more than it has bytes for"
            )
        return count
