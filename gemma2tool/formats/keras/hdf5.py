"""HDF5 files of plain arrays: where each array's bytes lie, and the bytes around them.

The arrays are contiguous, so they are read and written by offset like those of any other format. ``containers.hdf5``
reads a file's structure, without libhdf5; h5py writes it.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from gemma2tool.containers.hdf5 import reader as hdf5
from gemma2tool.errors import ToolError
from gemma2tool.errors.extras import require
from gemma2tool.formats.base import Closers
from gemma2tool.formats.mapping.container_tensors import NUMPY_DTYPES, FileTensor
from gemma2tool.model.lazy import BFLOAT16, DType
from gemma2tool.storage.buffers import AnyBuffer, byte_view
from gemma2tool.storage.reading import open_for_reading, starts_with

_PAGE = 1 << 16


def is_hdf5(path: Path) -> bool:
    """Whether a file begins with HDF5's signature. Never raises."""
    try:
        return starts_with(path, hdf5.MAGIC)
    except ToolError:
        return False


def read_datasets(path: Path, closers: Closers) -> dict[str, FileTensor]:
    """The arrays of a file by their full names ("layers/.../vars/0"). Raises InputRefused (``hdf5.*``)."""
    arrays = hdf5.read_arrays(path)
    reader = open_for_reading(path)
    closers.append(reader.close)
    return {
        name: FileTensor(reader, array.offset, NUMPY_DTYPES[array.dtype], array.shape, f"{path.name}: {name}")
        for name, array in arrays.items()
    }


def layout(
    arrays: Mapping[str, tuple[DType, tuple[int, ...]]],
    empty_groups: Iterable[str] = (),
) -> tuple[list[tuple[int, bytes]], dict[str, int], int]:
    """The file of contiguous ``arrays`` (dtype, shape) and of groups without any: the bytes around the values, the
    offset of each array, the size.
    """
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
        for name in empty_groups:
            file.require_group(name)
    extents = sorted(
        (offsets[name], offsets[name] + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        for name, (dtype, shape) in arrays.items()
    )
    return list(sparse.outside(extents)), offsets, sparse.size


class _SparseFile(io.RawIOBase):
    """A file of any size in memory that keeps only the pages that are written: HDF5's structure, but not the values."""

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

    def readinto(self, buffer: AnyBuffer) -> int:
        view = byte_view(buffer)
        count = max(min(len(view), self.size - self._position), 0)
        for offset, number, start, end in self._pieces(count):
            page = self._pages.get(number)
            view[offset : offset + end - start] = page[start:end] if page else bytes(end - start)
        self._position += count
        return count

    def write(self, data: AnyBuffer) -> int:
        view = byte_view(data)
        for offset, number, start, end in self._pieces(len(view)):
            self._pages.setdefault(number, bytearray(_PAGE))[start:end] = view[offset : offset + end - start]
        self._position += len(view)
        self.size = max(self.size, self._position)
        return len(view)

    def _pieces(self, count: int) -> Iterator[tuple[int, int, int, int]]:
        """(offset, page, start, end): the next ``count`` bytes by page, each piece with its offset among them."""
        done = 0
        while done < count:
            page, start = divmod(self._position + done, _PAGE)
            end = min(_PAGE, start + count - done)
            yield done, page, start, end
            done += end - start

    def outside(self, extents: list[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of the pages that were written, without the ``extents``, which are sorted."""
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
