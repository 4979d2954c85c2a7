"""Folders of zarr arrays, plain or inside an OCDBT database, read with tensorstore: what Orbax makes of a tree of parameters.

The arrays' metadata are read and bounded here, before tensorstore opens one. Chunks may be as large as an array. A chunk is decoded
once, and goes when its rows have been given out: those that zstandard compressed (Orbax's choice) piece by piece into the memory that
holds them, others by tensorstore into a cache of that size, which needs the compressed chunk beside it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.formats.blockwise import BlockwiseTensor, Rows
from gemma2tool.formats.extras import require
from gemma2tool.model.lazy import BFLOAT16, DTYPE_NAMES, FLOAT16, FLOAT32
from gemma2tool.storage import strict_json
from gemma2tool.storage.quoting import quoted

OCDBT_MANIFEST = "manifest.ocdbt"
ARRAY = ".zarray"
MAX_FILES = 200_000
MAX_ARRAYS = 20_000
MAX_METADATA_BYTES = 1 << 16
MAX_DIMS = 8
WINDOW = 8 << 20
"""Bytes read and decompressed at once."""
_DTYPES = {"<f4": FLOAT32, "<f2": FLOAT16, "<f8": np.dtype(np.float64), "bfloat16": BFLOAT16}
_HINT = "the checkpoint is damaged or incomplete: fetch it again"


@dataclass(frozen=True)
class StoredArray:
    """An array of a checkpoint folder: ``shape`` and ``chunks`` as stored."""

    folder: Path
    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    ocdbt: bool
    compressor: str | None = None
    separator: str = "."

    @property
    def origin(self) -> str:
        return f"{self.folder.name}: {self.name}"

    def matrix(self, *at: tuple[int, int]) -> ZarrMatrix:
        """The array as the matrix of its last axis' rows, without the axes that ``at`` fixes, given as (axis, index)."""
        return ZarrMatrix(self, dict(at))


def read_arrays(folder: Path) -> dict[str, StoredArray]:
    """The arrays of a folder by name. Raises InputRefused (``orbax.*``) for links, and for metadata that cannot be."""
    tensorstore = require("tensorstore", "flax", "reading Orbax checkpoints")
    files = _files(folder)
    ocdbt = OCDBT_MANIFEST in files
    try:
        store = tensorstore.KvStore.open(_kvstore(folder, ocdbt)).result()
        keys = [key.decode() for key in store.list().result()] if ocdbt else files
        names = [key.removesuffix("/" + ARRAY) for key in keys if key.endswith("/" + ARRAY)]
        if len(names) > MAX_ARRAYS:
            raise _refused("too-many-arrays", folder, f"holds {len(names)} arrays; at most {MAX_ARRAYS} are accepted")
        raw = {name: store.read(f"{name}/{ARRAY}") for name in sorted(names)}
        contents = {name: future.result().value for name, future in raw.items()}
    except (ValueError, OSError, RuntimeError, UnicodeError, KeyError) as error:
        raise _refused("broken", folder, f"cannot be read: {_first_line(error)}") from error
    present = set(keys)
    arrays = {}
    for name, content in contents.items():
        meta = strict_json.load(content, what=f"{folder.name}: {quoted(name)}: {ARRAY}", max_bytes=MAX_METADATA_BYTES)
        arrays[name] = _array(folder, name, meta, ocdbt)
        _check_chunks(arrays[name], meta, present)
    return arrays


def _check_chunks(array: StoredArray, meta: Mapping[str, object], present: set[str]) -> None:
    """Every chunk must be there, or the array say what a missing one holds: tensorstore would read zeros without a word."""
    if meta.get("fill_value") is not None:
        return
    grid = [range(-(-dim // chunk)) for dim, chunk in zip(array.shape, array.chunks, strict=True)]
    if prod(map(len, grid)) > MAX_FILES:
        raise _refused("too-many-chunks", array.folder, f"{quoted(array.name)} has {prod(map(len, grid))} chunks")
    for place in product(*grid):
        if f"{array.name}/{array.separator.join(map(str, place))}" not in present:
            raise _refused("missing-chunk", array.folder, f"a part of {quoted(array.name)} is missing: chunk {place}")


def _files(folder: Path) -> list[str]:
    """Names of all files below ``folder``, with forward slashes; links are refused, because they could lead anywhere."""
    found: list[str] = []
    for place, folders, names in os.walk(folder, followlinks=False):
        for name in (*folders, *names):
            if os.path.islink(os.path.join(place, name)):
                raise _refused("link", folder, f"{quoted(name)} inside it is a symbolic link")
        found += [os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/") for name in names]
        if len(found) > MAX_FILES:
            raise _refused("too-many-files", folder, f"holds more than {MAX_FILES} files")
    return found


def _kvstore(folder: Path, ocdbt: bool) -> dict[str, object]:
    base = {"driver": "file", "path": f"{folder.resolve()}/"}
    return {"driver": "ocdbt", "base": base} if ocdbt else base


def _array(folder: Path, name: str, meta: object, ocdbt: bool) -> StoredArray:
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
    # Arrays in another order of axes, or with values for missing chunks, are left to tensorstore.
    plain = meta.get("order") == "C" and meta.get("fill_value") is None
    separator = "/" if meta.get("dimension_separator") == "/" else "."
    return StoredArray(folder, name, tuple(shape), tuple(chunks), dtype, ocdbt, kind if plain else "other", separator)


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
        if array.compressor == "zstd" and array.chunks[1:] == array.shape[1:] and set(self.fixed) <= {0}:
            decoded = self._streamed()
            if decoded is not None:
                return decoded
        return self._handle()

    def _streamed(self) -> np.ndarray | None:
        """The whole matrix, decompressed chunk by chunk; None where the zstandard library is missing."""
        try:
            from zstandard import ZstdDecompressor, ZstdError
        except ImportError:
            return None
        tensorstore = require("tensorstore", "flax", "reading Orbax checkpoints")
        array = self.array
        depth = array.chunks[0]
        only = self.fixed.get(0)
        numbers = range(-(-array.shape[0] // depth)) if only is None else (only // depth,)
        one = prod(array.shape[1:])
        result = np.empty(self.shape, array.dtype)
        target = memoryview(result.reshape(-1).view(np.uint8))
        try:
            store = tensorstore.KvStore.open(_kvstore(array.folder, array.ocdbt)).result()
            for number in numbers:
                key = f"{array.name}/{array.separator.join(map(str, (number, *(0 for _ in array.shape[1:]))))}"
                source = ZstdDecompressor().stream_reader(_Value(store, key))
                skip = 0 if only is None else (only % depth) * one * array.dtype.itemsize
                wanted = (min(depth, array.shape[0] - number * depth) if only is None else 1) * one * array.dtype.itemsize
                _skip(source, skip)
                _fill(source, target[:wanted])
                target = target[wanted:]
                _skip(source, depth * one * array.dtype.itemsize - skip - wanted)
                if source.read(1):
                    raise ValueError("a chunk is longer than its shape")
        except (ValueError, OSError, RuntimeError, EOFError, ZstdError) as error:
            raise _refused("broken", array.folder, f"{quoted(array.name)}: {_first_line(error)}") from error
        return result

    def _handle(self) -> _Handle:
        tensorstore = require("tensorstore", "flax", "reading Orbax checkpoints")
        array = self.array
        slab = [min(chunk, dim) if axis == 0 else dim for axis, (chunk, dim) in enumerate(zip(array.chunks, array.shape, strict=True))]
        for axis in self.fixed:
            slab[axis] = array.chunks[axis]
        nbytes = prod(slab) * array.dtype.itemsize
        spec = {
            "driver": "zarr",
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


class _Value(io.RawIOBase):
    """A value of a key-value store, read piece by piece; its size need not be known."""

    def __init__(self, store, key: str) -> None:
        self.store, self.key, self.at, self.step = store, key, 0, WINDOW

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        while self.step:
            count = min(self.step, len(view))
            try:
                piece = self.store.read(self.key, byte_range=slice(self.at, self.at + count)).result().value
            except ValueError as error:
                if "OUT_OF_RANGE" not in str(error):
                    raise
                self.step = count // 2  # less than that is left
                continue
            view[: len(piece)] = piece
            self.at += len(piece)
            return len(piece)
        return 0


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
