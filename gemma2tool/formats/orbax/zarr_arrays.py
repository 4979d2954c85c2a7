"""Folders of zarr arrays, plain or inside an OCDBT database: how Orbax stores a tree of parameters.

Every value is located and its size is bounded before any is read. A chunk may be as large as an array: it is
decompressed piece by piece into the memory of the matrix that it belongs to, and never held beside it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from gemma2tool.containers import strict_json
from gemma2tool.containers.orbax import ocdbt
from gemma2tool.containers.orbax.ocdbt import StoredValue
from gemma2tool.errors.extras import require
from gemma2tool.formats.mapping.blockwise import BlockwiseTensor
from gemma2tool.formats.orbax.zarr_metadata import (
    INDEX_BYTES,
    ZARR2,
    ZARR3,
    ArrayMetadata,
    chunk_in_shard,
    parse_zarr2,
    parse_zarr3,
    refused,
)
from gemma2tool.model.lazy import DTYPE_NAMES, Array, DType
from gemma2tool.storage.paths import leads_to_blob
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


@dataclass(frozen=True)
class StoredArray:
    """An array of a checkpoint folder: what its ``metadata`` say, and its ``chunks`` by their place in the grid of
    chunks, without those that are not stored because they contain only zeros.
    """

    folder: Path
    name: str
    metadata: ArrayMetadata
    chunks: Mapping[tuple[int, ...], StoredValue] = field(repr=False)

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

    @property
    def holds_codes(self) -> bool:
        """Whether the values are a quantizer's integers."""
        return self.dtype not in DTYPE_NAMES

    def matrix(self, *fixed: tuple[int, int], kept: bool = True) -> ZarrMatrix:
        """The array as the matrix of its last axis' rows, without the axes fixed by (axis, index). ``kept``: see
        ``ZarrMatrix``. Raises ``InputRefused`` for integers.
        """
        if self.holds_codes:
            raise refused("dtype", f"{self.origin} holds {self.dtype.name} values without the scales of a quantizer")
        return ZarrMatrix(self, dict(fixed), kept=kept)

    def codes(self, *, kept: bool = True) -> ZarrMatrix:
        """The array's integers as the matrix of its last axis' rows."""
        return ZarrMatrix(self, {}, kept=kept)


@dataclass(frozen=True)
class ArrayFolder:
    """A folder of arrays whose metadata are not read yet.

    ``files``: the metadata file of each array, by the array's name. ``values``: all values of the folder by key.
    """

    folder: Path
    files: Mapping[str, str]
    values: Mapping[str, StoredValue] = field(repr=False)

    def read(self, names: Iterable[str] | None = None) -> dict[str, StoredArray]:
        """The arrays called ``names``, or all of them. Raises ``InputRefused`` (``orbax.*``)."""
        folder, files = self.folder, {name: self.files[name] for name in (self.files if names is None else names)}
        stores_zeros = ZARR3 in files.values() and _stores_zeros(folder)
        arrays: dict[str, StoredArray] = {}
        chunk_count = 0
        for name, file in files.items():
            origin = f"{folder.name}: {quoted(name)}"
            metadata = self._metadata(name, file, origin, stores_zeros)
            chunk_count += prod(map(len, metadata.grid))
            if chunk_count > MAX_FILES:
                raise refused(
                    "too-many-chunks",
                    f"{folder.name}: its arrays have {chunk_count} chunks or more; at most {MAX_FILES} are accepted",
                )
            arrays[name] = StoredArray(folder, name, metadata, _chunks(self.values, name, metadata, origin))
        return arrays

    def _metadata(self, name: str, file: str, origin: str, stores_zeros: bool) -> ArrayMetadata:
        value = self.values[f"{name}/{file}"]
        if value.nbytes > MAX_METADATA_BYTES:
            raise refused("metadata", f"{origin} has metadata of {value.nbytes} bytes")
        content = strict_json.load(read_value(value), what=f"{origin}: {file}", max_bytes=MAX_METADATA_BYTES)
        if file == ZARR2:
            return parse_zarr2(content, origin)
        return parse_zarr3(content, origin, stores_zeros=stores_zeros)


def list_arrays(folder: Path) -> ArrayFolder:
    """Which arrays a folder holds. Raises ``InputRefused`` (``orbax.*``, ``ocdbt.*``)."""
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
    files: dict[str, str] = {}
    for name, file in described:
        if name in files:
            raise refused("metadata", f"{folder.name}: {quoted(name)} is described twice")
        files[name] = file
    return ArrayFolder(folder, files, values)


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
    """Sizes of all files below ``folder`` by name, with forward slashes. Links are refused, because they could lead
    anywhere, but for those of the Hugging Face hub's cache.
    """
    sizes: dict[str, int] = {}
    for place, folders, names in os.walk(folder, followlinks=False):
        for name in (*folders, *names):
            path = os.path.join(place, name)
            if os.path.islink(path) and not leads_to_blob(Path(path)):
                raise refused("link", f"{folder.name}: {quoted(name)} inside it is a symbolic link")
        for name in names:
            path = os.path.join(place, name)
            sizes[os.path.relpath(path, folder).replace(os.sep, "/")] = os.stat(path).st_size
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


def _chunks(
    values: Mapping[str, StoredValue], name: str, metadata: ArrayMetadata, origin: str
) -> dict[tuple[int, ...], StoredValue]:
    """The chunks of an array. Refuses an array that lacks one, or that would expand to more bytes than weights do."""
    chunks: dict[tuple[int, ...], StoredValue] = {}
    for place in product(*metadata.grid):
        value = values.get(f"{name}/{metadata.chunk_key(place)}")
        if value is not None:
            chunks[place] = _chunk_of(value, origin) if metadata.is_zarr3 else value
        elif not metadata.missing_is_zero:
            raise refused("missing-chunk", f"{origin} lacks its chunk {place}")
    stored = sum(chunk.nbytes for chunk in chunks.values())
    nbytes = prod(metadata.shape) * metadata.dtype.itemsize
    if nbytes > max(MAX_EXPANDED_BYTES, MAX_RATIO * stored):
        raise refused("expands", f"{origin} would expand from {stored} to {nbytes} bytes, more than weights do")
    return chunks


def _chunk_of(shard: StoredValue, origin: str) -> StoredValue:
    """The only chunk in a shard."""
    if shard.nbytes < INDEX_BYTES:
        raise refused("broken", f"{origin} has a shard without an index")
    index = read_value(_part(shard, shard.nbytes - INDEX_BYTES, INDEX_BYTES))
    return _part(shard, *chunk_in_shard(index, shard.nbytes, origin))


def _part(value: StoredValue, first: int, nbytes: int) -> StoredValue:
    return StoredValue(value.path, value.offset + first, nbytes, value.inline[first : first + nbytes])


class ZarrMatrix(BlockwiseTensor):
    """A stored array, or the part of it where some axes have fixed indices, as the matrix of its last axis' rows.

    A block is the part of the matrix in one chunk, or the whole matrix if the rows of its chunks interleave. Blocks
    that are decompressed are ``kept`` for the rows that follow; who reads a few rows and no more has no use for them.
    """

    def __init__(self, array: StoredArray, fixed: Mapping[int, int], *, kept: bool = True) -> None:
        free = [dim for axis, dim in enumerate(array.shape) if axis not in fixed]
        self.array, self.fixed, self.kept = array, fixed, kept
        self.shape = (prod(free[:-1]), free[-1]) if len(free) > 1 else tuple(free)
        self.dtype, self.stored, self.origin = array.dtype, DTYPE_NAMES.get(array.dtype, array.dtype.name), array.origin
        chunks, grid = array.metadata.chunks, array.metadata.grid
        along = ([fixed[axis] // chunks[axis]] if axis in fixed else places for axis, places in enumerate(grid))
        self.places = list(product(*along))
        first, *others = self._runs(self.places[0])
        count = first[2]
        self.is_in_order = not others and count % self.row_size == 0 and count * len(self.places) == self.size
        self.block_rows = count // self.row_size if self.is_in_order else self.rows

    def load_rows(self, first: int, last: int) -> Array:
        if self.is_in_order and not (self.kept and self.array.metadata.is_compressed):
            return self._load(first, last)  # the rows alone; of an uncompressed chunk, from their place in the file
        return super().load_rows(first, last)

    def load_block(self, index: int) -> Array:
        return self._load(index * self.block_rows, min((index + 1) * self.block_rows, self.rows))

    def _load(self, first: int, last: int) -> Array:
        rows = np.zeros((last - first, *self.shape[1:]), self.dtype)
        target = rows.reshape(-1).view(np.uint8).data
        places = self.places
        if self.is_in_order:
            places = places[first // self.block_rows : -(-last // self.block_rows)]
        for place in places:
            chunk = self.array.chunks.get(place)
            if chunk is not None:
                self._read_chunk(chunk, place, target, first * self.row_size * self.dtype.itemsize)
        return rows

    def _read_chunk(self, chunk: StoredValue, place: Sequence[int], target: memoryview, origin: int) -> None:
        """Fill ``target``, which begins at byte ``origin`` of the matrix, with the chunk's part of it."""
        metadata, itemsize = self.array.metadata, self.dtype.itemsize
        errors: tuple[type[Exception], ...] = (ValueError, EOFError)
        try:
            with _ValueReader(chunk) as source:
                stream: io.RawIOBase = source
                if metadata.is_compressed:
                    zstandard = require("zstandard", "flax", "reading Orbax checkpoints")
                    errors = (*errors, zstandard.ZstdError)
                    stream = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(source)
                for in_matrix, in_chunk, count in self._runs(place):
                    start, end = (
                        min(max(at * itemsize - origin, 0), len(target)) for at in (in_matrix, in_matrix + count)
                    )
                    if start < end:
                        stream.seek(in_chunk * itemsize + start + origin - in_matrix * itemsize)
                        if stream.readinto(target[start:end]) != end - start:
                            raise EOFError("a chunk ends early")
                nbytes = prod(metadata.chunks) * itemsize
                if stream.seek(nbytes) != nbytes or stream.read(1):
                    raise ValueError(f"a chunk does not have the {nbytes} bytes of its shape")
        except errors as error:
            raise refused("broken", f"{self.origin}: {quoted(str(error).partition(chr(10))[0])[1:-1]}") from error

    def _runs(self, place: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """(position in the matrix, position in the chunk, length): the runs of values that are contiguous in both, in
        the chunk's order.
        """
        shape, chunks, fixed = self.array.shape, self.array.metadata.chunks, self.fixed
        starts = [index * chunk for index, chunk in zip(place, chunks, strict=True)]
        spans = [
            range(fixed[axis], fixed[axis] + 1) if axis in fixed else range(start, min(start + chunk, dim))
            for axis, (start, chunk, dim) in enumerate(zip(starts, chunks, shape, strict=True))
        ]
        outer = len(shape)
        while outer and len(spans[outer - 1]) == chunks[outer - 1] == (1 if outer - 1 in fixed else shape[outer - 1]):
            outer -= 1
        count = prod(chunks[outer:])
        if outer and outer - 1 not in fixed:  # along the innermost of these axes, runs continue one another
            count, spans[outer - 1] = count * len(spans[outer - 1]), spans[outer - 1][:1]
        in_matrix = in_chunk = np.zeros((), np.int64)
        for axis in range(outer):
            stride = 0 if axis in fixed else prod(dim for i, dim in enumerate(shape) if i > axis and i not in fixed)
            indices = np.array(spans[axis])
            in_matrix = np.add.outer(in_matrix, indices * stride)
            in_chunk = np.add.outer(in_chunk, (indices - starts[axis]) * prod(chunks[axis + 1 :]))
        return ((to, at, count) for to, at in zip(in_matrix.ravel().tolist(), in_chunk.ravel().tolist(), strict=True))


class _ValueReader(io.RawIOBase):
    """A value, read piece by piece."""

    def __init__(self, value: StoredValue) -> None:
        self.value, self.position = value, 0
        self.file = None if value.path is None else open_for_reading(value.path)

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = min(offset, self.value.nbytes)
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: self.value.nbytes - self.position]
        if self.file is None:
            view[:] = self.value.inline[self.position : self.position + len(view)]
        else:
            ahead = self.value.nbytes - self.position - len(view)
            self.file.pread_into(self.value.offset + self.position, view, ahead=ahead)
        self.position += len(view)
        return len(view)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        super().close()
