"""HDF5 files of plain arrays: where each array's bytes lie, and the bytes around them, through h5py.

h5py reads and writes the file's structure only; the arrays themselves are contiguous, so they are moved by offset like those of any
other format. What would make opening a file reach beyond it or run something is refused: links other than hard ones, external and
virtual storage, object types.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.formats.extras import require
from gemma2tool.formats.raw import FileTensor
from gemma2tool.model.lazy import BFLOAT16, FLOAT16, FLOAT32
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import open_for_reading

MAGIC = b"\x89HDF\r\n\x1a\n"
MAX_OBJECTS = 100_000
MAX_DEPTH = 32
_HINT = "the file is damaged or was not saved by Keras: fetch it again"
_PAGE = 1 << 16


def is_hdf5(path: Path) -> bool:
    """Whether a file begins as HDF5 files do. Never raises."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_datasets(path: Path, closers: list[Callable[[], None]]) -> dict[str, FileTensor]:
    """The arrays of a file by their full names ("layers/.../vars/0"). Raises InputRefused (``hdf5.*``)."""
    h5py = require("h5py", "keras", "reading Keras presets")
    reader = open_for_reading(path)
    closers.append(reader.close)
    if reader.size < len(MAGIC) or reader.pread(0, len(MAGIC)) != MAGIC:
        raise _refused("magic", path, "is not an HDF5 file")
    try:
        with h5py.File(path, "r") as file:
            return {name: _tensor(h5py, data, name, reader, path) for name, data in _walk(h5py, file, path)}
    except InputRefused:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, UnicodeError) as error:
        raise _refused("broken", path, f"cannot be read: {quoted(str(error))}") from error


def _walk(h5py, file, path: Path) -> Iterator[tuple[str, object]]:
    """(name, dataset) of everything below the root, each object once."""
    pending, seen = [("", file["/"], 0)], set()
    while pending:
        prefix, group, depth = pending.pop()
        address = h5py.h5o.get_info(group.id).addr
        if address in seen or depth > MAX_DEPTH:
            raise _refused("cycle", path, f"the group {quoted(prefix)} contains itself or is nested too deep")
        seen.add(address)
        for key in group:
            name = f"{prefix}/{key}" if prefix else key
            kind = type(group.get(key, getlink=True))
            if kind is not h5py.HardLink:
                raise _refused("link", path, f"{quoted(name)} is {_KINDS.get(kind.__name__, 'a link of another kind')}")
            item = group[key]
            if len(seen) + len(pending) > MAX_OBJECTS:
                raise _refused("too-many-objects", path, f"holds more than {MAX_OBJECTS} objects")
            if isinstance(item, h5py.Group):
                pending.append((name, item, depth + 1))
            elif isinstance(item, h5py.Dataset):
                yield name, item
            else:
                raise _refused("object", path, f"{quoted(name)} is neither a group nor an array")


_KINDS = {"SoftLink": "a soft link", "ExternalLink": "a link into another file"}


def _tensor(h5py, data, name: str, reader, path: Path) -> FileTensor:
    where = quoted(name)
    properties = data.id.get_create_plist()
    if properties.get_layout() == h5py.h5d.VIRTUAL:
        raise _refused("virtual", path, f"{where} is a virtual array, made of other files")
    if properties.get_external_count():
        raise _refused("external", path, f"{where} keeps its values in another file")
    if properties.get_layout() != h5py.h5d.CONTIGUOUS:
        raise _refused("chunked", path, f"{where} is stored in chunks; Keras stores arrays in one piece")
    dtype = _dtype(data)
    if dtype is None:
        raise _refused("dtype", path, f"{where} holds {quoted(str(data.dtype))}, not floating-point values")
    offset = data.id.get_offset()
    if data.shape is None or offset is None:
        raise _refused("empty", path, f"{where} has no values")
    tensor = FileTensor(reader, offset, dtype, tuple(data.shape), f"{path.name}: {name}")
    if offset + tensor.nbytes > reader.size or data.id.get_storage_size() != tensor.nbytes:
        raise _refused("extent", path, f"the values of {where} do not lie inside the file")
    return tensor


def _dtype(data) -> np.dtype | None:
    """The type of the values; Keras stores bfloat16 as opaque pairs of bytes with an attribute that says so."""
    if data.dtype in (FLOAT32, FLOAT16, np.dtype(np.float64)):
        return data.dtype
    if data.dtype == np.dtype("V2") and data.attrs.get("dtype") == "bfloat16":
        return BFLOAT16
    return None


def layout(arrays: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> tuple[list[tuple[int, bytes]], dict[str, int], int]:
    """The file of contiguous ``arrays`` (dtype, shape): the bytes around their values, each one's offset, and the file's size."""
    h5py = require("h5py", "keras", "writing Keras presets")
    sparse = _SparseFile()
    offsets: dict[str, int] = {}
    with h5py.File(sparse, "w") as file:
        for name, (dtype, shape) in arrays.items():
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_layout(h5py.h5d.CONTIGUOUS)
            properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            properties.set_obj_track_times(False)
            group = file.require_group(name.rpartition("/")[0])
            stored = np.dtype("V2") if dtype == BFLOAT16 else dtype.newbyteorder("<")
            kind, space = h5py.h5t.py_create(stored, logical=True), h5py.h5s.create_simple(shape)
            data = h5py.Dataset(h5py.h5d.create(group.id, name.rpartition("/")[2].encode(), kind, space, properties))
            if dtype == BFLOAT16:
                data.attrs["dtype"] = "bfloat16"
            offsets[name] = data.id.get_offset()
    extents = sorted(
        (offsets[name], offsets[name] + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        for name, (dtype, shape) in arrays.items()
    )
    return list(sparse.outside(extents)), offsets, sparse.size


class _SparseFile(io.RawIOBase):
    """A file of any size in memory that keeps only the pages written to: HDF5's structure, while the values stay holes."""

    def __init__(self) -> None:
        self.size = 0
        self._position = 0
        self._pages: dict[int, bytearray] = {}

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        count = max(min(len(view), self.size - self._position), 0)
        for at, page, start, end in self._pieces(count):
            held = self._pages.get(page)
            view[at : at + end - start] = held[start:end] if held else bytes(end - start)
        self._position += count
        return count

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        for at, page, start, end in self._pieces(len(view)):
            self._pages.setdefault(page, bytearray(_PAGE))[start:end] = view[at : at + end - start]
        self._position += len(view)
        self.size = max(self.size, self._position)
        return len(view)

    def _pieces(self, count: int) -> Iterator[tuple[int, int, int, int]]:
        done = 0
        while done < count:
            page, start = divmod(self._position + done, _PAGE)
            end = min(_PAGE, start + count - done)
            yield done, page, start, end
            done += end - start

    def outside(self, extents: list[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of the pages written to, without the ``extents``, which are sorted."""
        for number, page in sorted(self._pages.items()):
            first, last = number * _PAGE, min((number + 1) * _PAGE, self.size)
            at = first
            for begin, end in (*extents, (last, last)):
                if end <= at or begin > last:
                    continue
                if begin > at:
                    yield at, bytes(page[at - first : min(begin, last) - first])
                at = end
                if at >= last:
                    break


def _refused(kind: str, path: Path, message: str) -> InputRefused:
    return InputRefused(f"hdf5.{kind}", f"{path.name}: {message}", hint=_HINT)
