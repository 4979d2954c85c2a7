"""Folders of zarr arrays, plain or inside an OCDBT database: how Orbax stores a tree of parameters.

Where every value lies is found and bounded before any is read. A chunk may be as large as an array: it is decompressed
piece by piece into the memory of the matrix that it belongs to, and never held beside it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma2tool.containers import strict_json
from gemma2tool.containers.orbax import ocdbt
from gemma2tool.containers.orbax.ocdbt import StoredValue
from gemma2tool.formats.extras import require
from gemma2tool.formats.mapping.blockwise import BlockwiseTensor
from gemma2tool.formats.orbax.zarr_metadata import (
    INDEX_BYTES,
    ZARR2,
    ZARR3,
    ArrayMetadata,
    inner_chunk,
    parse_zarr2,
    parse_zarr3,
    refused,
)
from gemma2tool.model.lazy import DTYPE_NAMES, Array, DType
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import open_for_reading

OCDBT_MANIFEST = ocdbt.MANIFEST
TREE = "_METADATA"
MAX_TREE_BYTES = 64 << 20
MAX_FILES = 200_000
MAX_ARRAYS = 20_000
MAX_METADATA_BYTES = 1 << 16
MAX_WINDOW = 128 << 20
"""Bytes that a zstandard frame may require to be kept in memory."""
MAX_EXPANDED_BYTES, MAX_RATIO = 64 << 20, 1000
"""An array larger than this may not be more than this many times as large as what is stored of it."""
READ_BYTES = 8 << 20
"""Bytes decompressed or skipped at once."""


@dataclass(frozen=True)
class StoredArray:
    """An array of a checkpoint folder: what its ``metadata`` say, and the folder's ``values`` by key."""

    folder: Path
    name: str
    metadata: ArrayMetadata
    values: Mapping[str, StoredValue] = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.metadata.shape

    @property
    def dtype(self) -> DType:
        return self.metadata.dtype

    @property
    def origin(self) -> str:
        """Where the array is, for messages."""
        return f"{self.folder.name}: {self.name}"

    def key(self, place: Sequence[int]) -> str:
        """The key of a chunk, by its place in the grid of chunks."""
        if self.metadata.is_zarr3:
            return f"{self.name}/c/{'/'.join(map(str, place))}"
        return f"{self.name}/{'.'.join(map(str, place))}"

    def grid(self) -> list[range]:
        """The places of the chunks along each axis."""
        return [range(-(-dim // chunk)) for dim, chunk in zip(self.shape, self.metadata.chunks, strict=True)]

    def matrix(self, *fixed: tuple[int, int]) -> ZarrMatrix:
        """The array as the matrix of its last axis' rows, without the axes fixed by (axis, index)."""
        return ZarrMatrix(self, dict(fixed))


def read_arrays(folder: Path) -> dict[str, StoredArray]:
    """The arrays of a folder by name. Raises ``InputRefused`` (``orbax.*``, ``ocdbt.*``)."""
    sizes = _file_sizes(folder)
    if OCDBT_MANIFEST in sizes:
        values = ocdbt.read_entries(folder, decompress)
    else:
        values = {name: StoredValue(folder / name, 0, nbytes) for name, nbytes in sizes.items()}
    described = sorted(key.rpartition("/")[::2] for key in values if key.endswith((f"/{ZARR2}", f"/{ZARR3}")))
    if len(described) > MAX_ARRAYS:
        raise refused(
            "too-many-arrays", f"{folder.name}: holds {len(described)} arrays; at most {MAX_ARRAYS} are accepted"
        )
    stores_zeros = any(file == ZARR3 for _, file in described) and _stores_zeros(folder)
    arrays: dict[str, StoredArray] = {}
    chunk_count = 0
    for name, file in described:
        origin = f"{folder.name}: {quoted(name)}"
        if name in arrays:
            raise refused("metadata", f"{origin} is described twice")
        value = values[f"{name}/{file}"]
        if value.nbytes > MAX_METADATA_BYTES:
            raise refused("metadata", f"{origin} has metadata of {value.nbytes} bytes")
        content = strict_json.load(read_value(value), what=f"{origin}: {file}", max_bytes=MAX_METADATA_BYTES)
        metadata = (
            parse_zarr2(content, origin) if file == ZARR2 else parse_zarr3(content, origin, stores_zeros=stores_zeros)
        )
        array = StoredArray(folder, name, metadata, values)
        chunk_count += prod(map(len, array.grid()))
        if chunk_count > MAX_FILES:
            raise refused(
                "too-many-chunks",
                f"{folder.name}: its arrays have {chunk_count} chunks or more; at most {MAX_FILES} are accepted",
            )
        _check_chunks(array, origin)
        arrays[name] = replace(array, values=_inner_chunks(array, origin)) if metadata.is_sharded else array
    return arrays


def decompress(data: bytes, limit: int) -> bytes:
    """The content of a zstandard frame. Raises ``ValueError`` for anything else, and for more than ``limit`` bytes."""
    zstandard = require("zstandard", "flax", "reading Orbax checkpoints")
    try:
        content: bytes = zstandard.ZstdDecompressor(max_window_size=limit).stream_reader(data).read(limit + 1)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    if len(content) > limit:
        raise ValueError(f"holds more than {limit} bytes")
    return content


def read_value(value: StoredValue) -> bytes:
    """All bytes of a value."""
    if value.path is None:
        return value.inline
    with open_for_reading(value.path) as reader:
        return bytes(reader.pread(value.offset, value.nbytes))


def _file_sizes(folder: Path) -> dict[str, int]:
    """Sizes of all files below ``folder`` by name, with forward slashes. Links are refused: they could lead
    anywhere.
    """
    sizes: dict[str, int] = {}
    for place, folders, names in os.walk(folder, followlinks=False):
        for name in (*folders, *names):
            if os.path.islink(os.path.join(place, name)):
                raise refused("link", f"{folder.name}: {quoted(name)} inside it is a symbolic link")
        for name in names:
            path = os.path.join(place, name)
            sizes[os.path.relpath(path, folder).replace(os.sep, "/")] = os.stat(path, follow_symlinks=False).st_size
        if len(sizes) > MAX_FILES:
            raise refused("too-many-files", f"{folder.name}: holds more than {MAX_FILES} files")
    return sizes


def _stores_zeros(folder: Path) -> bool:
    """Whether Orbax recorded that it stored chunks that contain only the fill value, too."""
    path = folder / TREE
    if not path.is_file():
        return False
    content = strict_json.load(path, what=TREE, max_bytes=MAX_TREE_BYTES)
    return isinstance(content, dict) and content.get("store_array_data_equal_to_fill_value") is True


def _check_chunks(array: StoredArray, origin: str) -> None:
    """Refuse an array with a missing chunk, or one that would expand to more bytes than weights do."""
    stored = 0
    for place in product(*array.grid()):
        value = array.values.get(array.key(place))
        if value is None and not array.metadata.missing_is_zero:
            raise refused("missing-chunk", f"{origin} lacks its chunk {place}")
        stored += 0 if value is None else value.nbytes
    nbytes = prod(array.shape) * array.dtype.itemsize
    if nbytes > max(MAX_EXPANDED_BYTES, MAX_RATIO * stored):
        raise refused("expands", f"{origin} would expand from {stored} to {nbytes} bytes, more than weights do")


def _inner_chunks(array: StoredArray, origin: str) -> dict[str, StoredValue]:
    """The only inner chunk of each shard of an array, by the shard's key."""
    inner: dict[str, StoredValue] = {}
    for place in product(*array.grid()):
        key = array.key(place)
        shard = array.values.get(key)
        if shard is None:
            continue
        if shard.nbytes < INDEX_BYTES:
            raise refused("broken", f"{origin} has a shard without an index")
        index = read_value(_part(shard, shard.nbytes - INDEX_BYTES, INDEX_BYTES))
        inner[key] = _part(shard, *inner_chunk(index, shard.nbytes, origin))
    return inner


def _part(value: StoredValue, first: int, nbytes: int) -> StoredValue:
    return StoredValue(value.path, value.offset + first, nbytes, value.inline[first : first + nbytes])


class ZarrMatrix(BlockwiseTensor):
    """A stored array, or the part of it where some axes have fixed indices, as the matrix of its last axis' rows.

    A block is the part of the matrix in one chunk, or the whole matrix if the rows of its chunks interleave.
    """

    def __init__(self, array: StoredArray, fixed: Mapping[int, int]) -> None:
        free = [dim for axis, dim in enumerate(array.shape) if axis not in fixed]
        self.array, self.fixed = array, fixed
        self.shape = (prod(free[:-1]), free[-1]) if len(free) > 1 else tuple(free)
        self.dtype, self.stored, self.origin = array.dtype, DTYPE_NAMES[array.dtype], array.origin
        chunks = array.metadata.chunks
        self.places = list(
            product(
                *([fixed[axis] // chunks[axis]] if axis in fixed else along for axis, along in enumerate(array.grid()))
            )
        )
        starts, _, count = self._runs(self.places[0])
        is_in_order = len(starts) == 1 and count % self.row_size == 0 and count * len(self.places) == self.size
        self.block_rows = count // self.row_size if is_in_order else self.rows
        self.is_plain = is_in_order and not array.metadata.is_compressed

    def load_rows(self, first: int, last: int) -> Array:
        if not self.is_plain:
            return super().load_rows(first, last)
        pieces = [np.empty((0, *self.shape[1:]), self.dtype)]
        while first < last:
            index, start = divmod(first, self.block_rows)
            count = min(self.block_rows - start, last - first)
            pieces.append(self._stored_rows(self.places[index], start, count))
            first += count
        return pieces[1] if len(pieces) == 2 else np.concatenate(pieces)

    def _stored_rows(self, place: Sequence[int], start: int, count: int) -> Array:
        """Rows of a chunk that has the matrix's rows one after the other, read from their place in the file."""
        rows = np.zeros((count, *self.shape[1:]), self.dtype)
        value = self.array.values.get(self.array.key(place))
        if value is not None:
            expected = prod(self.array.metadata.chunks) * self.dtype.itemsize
            if value.nbytes != expected:
                raise refused("broken", f"{self.origin}: a chunk has {value.nbytes} bytes, not {expected}")
            _, in_chunk, _ = self._runs(place)
            with _ValueReader(value) as source:
                source.position = (int(in_chunk[0]) + start * self.row_size) * self.dtype.itemsize
                _fill(source, rows.reshape(-1).view(np.uint8).data)
        return rows

    def load_block(self, index: int) -> Array:
        first = index * self.block_rows
        block = np.zeros((min(self.block_rows, self.rows - first), *self.shape[1:]), self.dtype)
        target = block.reshape(-1).view(np.uint8).data
        for place in self.places if self.block_rows == self.rows else self.places[index : index + 1]:
            value = self.array.values.get(self.array.key(place))
            if value is not None:
                self._read_chunk(value, place, target, first * self.row_size)
        return block

    def _read_chunk(self, value: StoredValue, place: Sequence[int], target: memoryview, origin: int) -> None:
        """Fill ``target``, which begins at value ``origin`` of the matrix, with what a chunk has of it."""
        metadata, itemsize, position = self.array.metadata, self.dtype.itemsize, 0
        errors: tuple[type[Exception], ...] = (ValueError, EOFError)
        try:
            with _ValueReader(value) as source:
                stream: io.RawIOBase = source
                if metadata.is_compressed:
                    zstandard = require("zstandard", "flax", "reading Orbax checkpoints")
                    errors = (*errors, zstandard.ZstdError)
                    stream = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(source)
                in_matrix, in_chunk, count = self._runs(place)
                for to, at in zip((in_matrix - origin) * itemsize, in_chunk * itemsize, strict=True):
                    _skip(stream, at - position)
                    _fill(stream, target[to : to + count * itemsize])
                    position = at + count * itemsize
                _skip(stream, prod(metadata.chunks) * itemsize - position)
                if stream.read(1):
                    raise ValueError("a chunk is longer than its shape")
        except errors as error:
            raise refused("broken", f"{self.origin}: {quoted(str(error).partition(chr(10))[0])}") from error

    def _runs(self, place: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """The runs of values that lie side by side both in the chunk at ``place`` and in the matrix, in the chunk's
        order: where each begins in the matrix, where in the chunk, and how many values every run has.
        """
        shape, chunks, fixed = self.array.shape, self.array.metadata.chunks, self.fixed
        inner = len(shape)
        while inner and chunks[inner - 1] == (1 if inner - 1 in fixed else shape[inner - 1]):
            inner -= 1
        count = prod(chunks[inner:])
        in_matrix = in_chunk = np.zeros(1, np.int64)
        for axis in range(inner):
            start = place[axis] * chunks[axis]
            stride = 0 if axis in fixed else prod(dim for i, dim in enumerate(shape) if i > axis and i not in fixed)
            indices = (
                np.array([fixed[axis] - start]) if axis in fixed else np.arange(min(chunks[axis], shape[axis] - start))
            )
            if axis == inner - 1 and axis not in fixed:  # along the innermost of these axes, runs continue one another
                count, indices = count * len(indices), indices[:1]
            in_matrix = (in_matrix[:, None] + (start + indices) * stride).reshape(-1)
            in_chunk = (in_chunk[:, None] + indices * prod(chunks[axis + 1 :])).reshape(-1)
        return in_matrix, in_chunk, count


class _ValueReader(io.RawIOBase):
    """A value, read piece by piece."""

    def __init__(self, value: StoredValue) -> None:
        self.value, self.position = value, 0
        self.file = None if value.path is None else open_for_reading(value.path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: self.value.nbytes - self.position]
        if self.file is None:
            view[:] = self.value.inline[self.position : self.position + len(view)]
        else:
            self.file.pread_into(self.value.offset + self.position, view)
        self.position += len(view)
        return len(view)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        super().close()


def _fill(source: io.RawIOBase, target: memoryview) -> None:
    while target:
        count = source.readinto(target[:READ_BYTES])
        if not count:
            raise EOFError("a chunk ends early")
        target = target[count:]


def _skip(source: io.RawIOBase, nbytes: int) -> None:
    scratch = memoryview(bytearray(min(nbytes, READ_BYTES)))
    while nbytes:
        _fill(source, scratch[:nbytes])
        nbytes -= min(nbytes, len(scratch))
