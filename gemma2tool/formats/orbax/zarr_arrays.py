"""Folders of zarr arrays, plain or inside an OCDBT database: what Orbax makes of a tree of parameters.

Arrays are of zarr 2, or of zarr 3 by way of ``zarr3``. Where every value lies is found and bounded here and in ``storage.ocdbt``. Chunks may be as large as an array. A chunk is decoded
once, and goes when its rows have been given out: those that zstandard compressed (Orbax's choice) piece by piece into the memory that
holds them. Other compressors, and chunks that divide more than the first axis, are left to tensorstore, which then opens a database
that has been checked; its cache has the chunk's size, and the compressed chunk lies beside it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from pathlib import Path

import numpy as np

from gemma2tool.containers import strict_json
from gemma2tool.containers.orbax import ocdbt
from gemma2tool.containers.orbax.ocdbt import StoredValue
from gemma2tool.errors import InputRefused
from gemma2tool.formats.extras import require
from gemma2tool.formats.mapping.blockwise import BlockwiseTensor, Rows
from gemma2tool.formats.orbax import zarr3
from gemma2tool.model.lazy import BFLOAT16, DTYPE_NAMES, FLOAT16, FLOAT32
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import open_for_reading

OCDBT_MANIFEST = ocdbt.MANIFEST
ARRAY = ".zarray"
TREE = "_METADATA"
MAX_TREE_BYTES = 64 << 20
MAX_FILES = 200_000
MAX_ARRAYS = 20_000
MAX_METADATA_BYTES = 1 << 16
MAX_DIMS = 8
MAX_WINDOW = 128 << 20
"""Of zstandard: what a frame may ask to be kept in memory."""
MAX_EXPANDED_BYTES, MAX_RATIO = 64 << 20, 1000
"""An array of more bytes than these may not be so many times as large as what is stored of it."""
WINDOW = 8 << 20
"""Bytes read and decompressed at once."""
_DTYPES = {"<f4": FLOAT32, "<f2": FLOAT16, "<f8": np.dtype(np.float64), "bfloat16": BFLOAT16}
_COMPRESSORS = (None, "zstd", "gzip", "zlib", "bz2", "blosc", zarr3.OTHER)
_HINT = "the checkpoint is damaged or incomplete: fetch it again"


@dataclass(frozen=True)
class StoredArray:
    """An array of a checkpoint folder: ``shape`` and ``chunks`` as stored; ``values`` are all of the folder's, by key."""

    folder: Path
    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    values: Mapping[str, StoredValue] = field(repr=False)
    ocdbt: bool = False
    compressor: str | None = None
    separator: str = "."
    prefix: str = ""
    driver: str = "zarr"

    def key(self, place: Sequence[int]) -> str:
        """The key of a chunk's value, by the chunk's place in the grid."""
        return f"{self.name}/{self.prefix}{self.separator.join(map(str, place))}"

    @property
    def origin(self) -> str:
        return f"{self.folder.name}: {self.name}"

    def matrix(self, *at: tuple[int, int]) -> ZarrMatrix:
        """The array as the matrix of its last axis' rows, without the axes that ``at`` fixes, given as (axis, index)."""
        return ZarrMatrix(self, dict(at))


def read_arrays(folder: Path) -> dict[str, StoredArray]:
    """The arrays of a folder by name. Raises InputRefused (``orbax.*``, ``ocdbt.*``) for links, and for metadata that cannot be."""
    sizes = _files(folder)
    in_database = OCDBT_MANIFEST in sizes
    values = (
        ocdbt.read_entries(folder, _unpack)
        if in_database
        else {name: StoredValue(folder / name, 0, n) for name, n in sizes.items()}
    )
    described = sorted(key.rpartition("/")[::2] for key in values if key.endswith(("/" + ARRAY, "/" + zarr3.METADATA)))
    if len(described) > MAX_ARRAYS:
        raise _refused("too-many-arrays", folder, f"holds {len(described)} arrays; at most {MAX_ARRAYS} are accepted")
    stores_all = any(file == zarr3.METADATA for _, file in described) and _stores_all(folder)
    arrays, chunks = {}, 0
    for name, file in described:
        value = values[f"{name}/{file}"]
        if value.nbytes > MAX_METADATA_BYTES:
            raise _refused("metadata", folder, f"{quoted(name)} has metadata of {value.nbytes} bytes")
        meta = strict_json.load(
            _whole(value), what=f"{folder.name}: {quoted(name)}: {file}", max_bytes=MAX_METADATA_BYTES
        )
        if file == zarr3.METADATA:
            try:
                meta = zarr3.as_zarr2(meta, stores_all=stores_all)
            except ValueError as error:
                raise _refused("metadata", folder, f"{quoted(name)} {error}") from None
        if name in arrays:
            raise _refused("metadata", folder, f"{quoted(name)} is described twice")
        arrays[name] = _array(folder, name, meta, values, in_database)
        chunks += prod(map(len, _grid(arrays[name])))
        if chunks > MAX_FILES:
            raise _refused(
                "too-many-chunks", folder, f"its arrays have {chunks} chunks or more; at most {MAX_FILES} are accepted"
            )
        _check_chunks(arrays[name], meta)
        if meta.get("sharded") and arrays[name].compressor != zarr3.OTHER:
            arrays[name] = replace(arrays[name], values=_inner_chunks(arrays[name]))
    return arrays


def _inner_chunks(array: StoredArray) -> dict[str, StoredValue]:
    """The only inner chunk of each of an array's shards, by the shard's key."""
    found = {}
    for place in product(*_grid(array)):
        key = array.key(place)
        shard = array.values[key]
        try:
            if shard.nbytes < zarr3.INDEX_BYTES:
                raise ValueError("has a shard without an index")
            index = _whole(_part(shard, shard.nbytes - zarr3.INDEX_BYTES, zarr3.INDEX_BYTES))
            found[key] = _part(shard, *zarr3.inner_chunk(index, shard.nbytes))
        except ValueError as error:
            raise _refused("broken", array.folder, f"{quoted(array.name)} {error}") from None
    return found


def _part(value: StoredValue, first: int, nbytes: int) -> StoredValue:
    return StoredValue(value.path, value.offset + first, nbytes, value.inline[first : first + nbytes])


def _grid(array: StoredArray) -> list[range]:
    """Places of the array's chunks along each axis."""
    return [range(-(-dim // chunk)) for dim, chunk in zip(array.shape, array.chunks, strict=True)]


def _stores_all(folder: Path) -> bool:
    """Whether Orbax says that it stored chunks of nothing but zeros, too."""
    path = folder / TREE
    if not path.is_file():
        return False
    content = strict_json.load(path, what=TREE, max_bytes=MAX_TREE_BYTES)
    return isinstance(content, dict) and content.get("store_array_data_equal_to_fill_value") is True


def _unpack(data: bytes, limit: int) -> bytes:
    """One zstandard frame; ValueError where it is none or holds more than ``limit`` bytes."""
    zstandard = require("zstandard", "flax", "reading Orbax checkpoints")
    try:
        decoded = zstandard.ZstdDecompressor(max_window_size=limit).stream_reader(data).read(limit + 1)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    if len(decoded) > limit:
        raise ValueError(f"holds more than {limit} bytes")
    return decoded


def _whole(value: StoredValue) -> bytes:
    if value.path is None:
        return value.inline
    with open_for_reading(value.path) as reader:
        return bytes(reader.pread(value.offset, value.nbytes))


def _check_chunks(array: StoredArray, meta: Mapping[str, object]) -> None:
    """Every chunk must be there, or the array say what a missing one holds: tensorstore would read zeros without a word."""
    stored = 0
    for place in product(*_grid(array)):
        value = array.values.get(array.key(place))
        if value is None and meta.get("fill_value") is None:
            raise _refused("missing-chunk", array.folder, f"a part of {quoted(array.name)} is missing: chunk {place}")
        stored += 0 if value is None else value.nbytes
    nbytes = prod(array.shape) * array.dtype.itemsize
    if nbytes > max(MAX_EXPANDED_BYTES, MAX_RATIO * stored):
        raise _refused(
            "expands",
            array.folder,
            f"{quoted(array.name)} would make {nbytes} bytes of {stored}; no weights are like that",
        )


def _files(folder: Path) -> dict[str, int]:
    """Sizes of all files below ``folder`` by name, with forward slashes; links are refused, because they could lead anywhere."""
    found: dict[str, int] = {}
    for place, folders, names in os.walk(folder, followlinks=False):
        for name in (*folders, *names):
            if os.path.islink(os.path.join(place, name)):
                raise _refused("link", folder, f"{quoted(name)} inside it is a symbolic link")
        for name in names:
            path = os.path.join(place, name)
            found[os.path.relpath(path, folder).replace(os.sep, "/")] = os.stat(path, follow_symlinks=False).st_size
        if len(found) > MAX_FILES:
            raise _refused("too-many-files", folder, f"holds more than {MAX_FILES} files")
    return found


def _kvstore(folder: Path, ocdbt: bool) -> dict[str, object]:
    base = {"driver": "file", "path": f"{folder.resolve()}/"}
    return {"driver": "ocdbt", "base": base} if ocdbt else base


def _array(folder: Path, name: str, meta: object, values: Mapping[str, StoredValue], in_database: bool) -> StoredArray:
    if not isinstance(meta, dict) or meta.get("zarr_format") != 2 or meta.get("filters") is not None:
        raise _refused("metadata", folder, f"{quoted(name)} is not a plain zarr array")
    shape, chunks = meta.get("shape"), meta.get("chunks")
    if not (_are_sizes(shape) and _are_sizes(chunks)) or not 0 < len(shape) == len(chunks) <= MAX_DIMS:
        raise _refused("shape", folder, f"{quoted(name)} has the shape {quoted(shape)} in chunks of {quoted(chunks)}")
    if any(chunk > dim for chunk, dim in zip(chunks, shape, strict=True)) or prod(shape) >= 1 << 40:
        raise _refused("shape", folder, f"{quoted(name)} has the shape {quoted(shape)} in chunks of {quoted(chunks)}")
    dtype = _DTYPES.get(meta["dtype"]) if isinstance(meta.get("dtype"), str) else None
    if dtype is None:
        raise _refused("dtype", folder, f"{quoted(name)} holds {quoted(meta.get('dtype'))}, not floating-point values")
    compressor = meta.get("compressor")
    kind = str(compressor.get("id")) if isinstance(compressor, dict) else None
    if kind not in _COMPRESSORS:
        raise _refused("compressor", folder, f"{quoted(name)} is compressed with {quoted(kind)}, which is not read")
    # Arrays in another order of axes, or with values for missing chunks, are left to tensorstore.
    plain = meta.get("order") == "C" and meta.get("fill_value") is None
    separator = "/" if meta.get("dimension_separator") == "/" else "."
    kind = kind if plain else zarr3.OTHER
    prefix = meta.get("prefix")  # of zarr 3 alone
    driver = "zarr" if prefix is None else "zarr3"
    return StoredArray(
        folder, name, tuple(shape), tuple(chunks), dtype, values, in_database, kind, separator, prefix or "", driver
    )


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 < value < 1 << 40 for value in values)


class ZarrMatrix(BlockwiseTensor):
    """A stored array, or the part of it where some axes have fixed indices, as the matrix of its last axis' rows."""

    def __init__(self, array: StoredArray, fixed: dict[int, int]) -> None:
        self.array, self.fixed = array, fixed
        self.free = tuple(dim for axis, dim in enumerate(array.shape) if axis not in fixed)
        self.shape = (prod(self.free[:-1]), self.free[-1]) if len(self.free) > 1 else self.free
        self.dtype, self.stored, self.origin = array.dtype, DTYPE_NAMES[array.dtype], array.origin
        self.block_rows = self.shape[0]

    def load_block(self, index: int) -> Rows:
        array = self.array
        if array.chunks[1:] == array.shape[1:] and set(self.fixed) <= {0}:
            if array.compressor == "zstd":
                return self._streamed()
            if array.compressor is None:
                return _Stored(self)
        return self._handle()

    def _streamed(self) -> np.ndarray:
        """The whole matrix, decompressed chunk by chunk."""
        zstandard = require("zstandard", "flax", "reading Orbax checkpoints")
        array, one, depth = self.array, prod(self.array.shape[1:]) * self.dtype.itemsize, self.array.chunks[0]
        result = np.empty(self.shape, array.dtype)
        target = memoryview(result.reshape(-1).view(np.uint8))
        try:
            for key, first, count in self._parts():
                with _ValueReader(array.values[key]) as raw:
                    source = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(raw)
                    _skip(source, first * one)
                    _fill(source, target[: count * one])
                    target = target[count * one :]
                    _skip(source, (depth - first - count) * one)
                    if source.read(1):
                        raise ValueError("a chunk is longer than its shape")
        except (ValueError, OSError, RuntimeError, EOFError, zstandard.ZstdError) as error:
            raise _refused("broken", array.folder, f"{quoted(array.name)}: {_first_line(error)}") from error
        return result

    def _parts(self) -> Iterator[tuple[str, int, int]]:
        """(key, first index, count) along the first axis, of the chunks that the matrix' values are in, which are whole otherwise."""
        array, only = self.array, self.fixed.get(0)
        depth = array.chunks[0]
        for number in range(-(-array.shape[0] // depth)) if only is None else (only // depth,):
            key = array.key((number, *(0 for _ in array.shape[1:])))
            yield key, *((0, min(depth, array.shape[0] - number * depth)) if only is None else (only % depth, 1))

    def _handle(self) -> _Handle:
        tensorstore = require("tensorstore", "flax", "reading Orbax checkpoints")
        array = self.array
        slab = [
            min(chunk, dim) if axis == 0 else dim
            for axis, (chunk, dim) in enumerate(zip(array.chunks, array.shape, strict=True))
        ]
        for axis in self.fixed:
            slab[axis] = array.chunks[axis]
        nbytes = prod(slab) * array.dtype.itemsize
        spec = {
            "driver": array.driver,
            "kvstore": _kvstore(array.folder, array.ocdbt) | {"path": self._path()},
            "recheck_cached_data": "open",
            "recheck_cached_metadata": "open",
        }
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": nbytes + (1 << 20)}})
        try:
            store = tensorstore.open(spec, open=True, read=True, context=context).result()
        except (ValueError, OSError, RuntimeError) as error:
            raise _refused("broken", array.folder, f"{quoted(array.name)}: {_first_line(error)}") from error
        if tuple(store.shape) != array.shape:
            raise _refused("shape", array.folder, f"{quoted(array.name)} has another shape than when it was opened")
        part = store[tuple(self.fixed.get(axis, slice(None)) for axis in range(len(array.shape)))]
        return _Handle(part, self, nbytes)

    def _path(self) -> str:
        """Relative to the database, or, among plain files, the folder itself."""
        return f"{self.array.name}/" if self.array.ocdbt else f"{self.array.folder.resolve()}/{self.array.name}/"


class _Stored:
    """The rows of an array whose chunks are stored as they are; nothing of them is held."""

    nbytes = 0

    def __init__(self, matrix: ZarrMatrix) -> None:
        array, self.matrix = matrix.array, matrix
        one = prod(array.shape[1:]) * array.dtype.itemsize
        self.pieces: list[tuple[int, int, StoredValue]] = []
        """(first byte of the matrix, one past the last, where)"""
        at = 0
        for key, first, count in matrix._parts():
            value = array.values[key]
            if value.nbytes != array.chunks[0] * one:
                raise _refused(
                    "broken", array.folder, f"{quoted(array.name)}: the chunk {quoted(key)} has {value.nbytes} bytes"
                )
            self.pieces.append((at, at + count * one, _part(value, first * one, count * one)))
            at += count * one

    def __len__(self) -> int:
        return self.matrix.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        matrix = self.matrix
        result = np.empty((rows.stop - rows.start, *matrix.shape[1:]), matrix.dtype)
        width = matrix.row_size * matrix.dtype.itemsize
        begin, target = rows.start * width, memoryview(result.reshape(-1).view(np.uint8))
        for first, last, value in self.pieces:
            start, stop = max(begin, first), min(begin + len(target), last)
            if start >= stop:
                continue
            part = target[start - begin : stop - begin]
            if value.path is None:
                part[:] = value.inline[start - first : stop - first]
            else:
                with open_for_reading(value.path) as file:
                    file.pread_into(value.offset + start - first, part)
        return result


class _Handle:
    """An open array whose rows, those of the last axis, can be sliced. ``nbytes``: what its cache may hold."""

    def __init__(self, store, matrix: ZarrMatrix, nbytes: int) -> None:
        self.store, self.matrix, self.nbytes = store, matrix, nbytes

    def __len__(self) -> int:
        return self.matrix.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        matrix, first, last = self.matrix, rows.start, rows.stop
        result = np.empty((last - first, *matrix.shape[1:]), matrix.dtype)
        per_outer = matrix.free[-2] if len(matrix.free) > 1 else matrix.free[0]
        at = first
        try:
            while at < last:
                outer, start = divmod(at, per_outer)
                count = min(per_outer - start, last - at)
                place = np.unravel_index(outer, matrix.free[:-2]) if len(matrix.free) > 2 else ()
                part = self.store[(*(int(index) for index in place), slice(start, start + count))]
                result[at - first : at - first + count] = part.read().result()
                at += count
        except (ValueError, OSError, RuntimeError) as error:
            array = matrix.array
            raise _refused("broken", array.folder, f"{quoted(array.name)}: {_first_line(error)}") from error
        return result


class _ValueReader(io.RawIOBase):
    """A value of a database, read piece by piece."""

    def __init__(self, value: StoredValue) -> None:
        self.value, self.at = value, 0
        self.file = None if value.path is None else open_for_reading(value.path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), self.value.nbytes - self.at)
        if self.file is None:
            view[:count] = self.value.inline[self.at : self.at + count]
        else:
            self.file.pread_into(self.value.offset + self.at, view[:count])
        self.at += count
        return count

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        super().close()


def _fill(source: io.RawIOBase, target: memoryview) -> None:
    while target:
        got = source.readinto(target[:WINDOW])
        if not got:
            raise EOFError("a chunk ends early")
        target = target[got:]


def _skip(source: io.RawIOBase, count: int) -> None:
    scratch = memoryview(bytearray(min(count, WINDOW)))
    while count:
        _fill(source, scratch[:count])
        count -= min(count, len(scratch))


def _first_line(error: Exception) -> str:
    return quoted(str(error).splitlines()[0] if str(error) else type(error).__name__)


def _refused(kind: str, folder: Path, message: str) -> InputRefused:
    return InputRefused(f"orbax.{kind}", f"{folder.name}: {message}", hint=_HINT)
