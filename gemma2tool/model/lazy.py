"""Lazily loaded tensors: shape and dtype are known at once, values are read a range of rows at a time.

A *row* is an index of the first axis. The number of rows requested at once sets the peak memory of everything that
streams, so nothing here may read more than the requested rows.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
"""An array whose dtype is known only when the program runs."""

DType = np.dtype[Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)

DTYPE_NAMES = {FLOAT32: "f32", FLOAT16: "f16", BFLOAT16: "bf16", FLOAT64: "f64"}
"""Names of the float types, as the command line spells them."""

_COMPARE_BYTES = 4 << 20

FLOAT_DTYPES = {"f32": FLOAT32, "f16": FLOAT16, "bf16": BFLOAT16}


def to_float32(array: Array) -> Array:
    """The values as float32; exact for float16 and bfloat16."""
    if array.dtype == FLOAT32:
        return array
    if array.dtype == BFLOAT16:
        wide = array.view(np.uint16).astype(np.uint32)
        np.left_shift(wide, 16, out=wide)
        return wide.view(FLOAT32)
    return array.astype(FLOAT32)


class LazyTensor(ABC):
    """A tensor whose values are read when rows are requested.

    ``shape``: the logical shape. ``dtype``: of the arrays that ``load_rows`` returns. ``stored``: the type that the
    values are stored in ("bf16", "q8_0", "nf4", ...). ``origin``: where they are, for messages ("model.ckpt:
    embedder.weight"). ``group_size``: how many neighboring columns share a quantization scale; None where the type
    determines it, or for a whole row. Loading is thread-safe.
    """

    shape: tuple[int, ...]
    dtype: DType
    stored: str
    origin: str
    group_size: int | None = None

    @abstractmethod
    def load_rows(self, first: int, last: int) -> Array:
        """Rows ``first`` up to but not including ``last``: a new array of shape ``(last - first, *shape[1:])``."""

    def load_rows_exact(self, first: int, last: int) -> Array:
        """``load_rows``, in float64 where ``dtype`` cannot represent the stored values. For comparing bits, and for
        digests."""
        return self.load_rows(first, last)

    def announce(self, first: int = 0, last: int | None = None) -> None:  # noqa: B027  (most tensors have nothing to say)
        """Rows ``first`` to ``last`` (default: all) will be read soon; a source that is far away fetches them
        meanwhile. More rows may be fetched where those are not beside each other.
        """

    @property
    def stored_dtype(self) -> DType:
        """The float type of the values in an output for which no other is requested: ``dtype``, except for values that
        were computed in a wider type."""
        return self.dtype

    def load(self) -> Array:
        """The whole tensor; only for tensors known to be small."""
        return self.load_rows(0, self.shape[0]) if self.shape else self.load_rows(0, 1).reshape(())

    def load_rows_f32(self, first: int, last: int) -> Array:
        """``load_rows`` widened (or, from float64, narrowed) to float32."""
        return to_float32(self.load_rows(first, last))

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_size(self) -> int:
        """How many values a row has."""
        size = 1
        for dim in self.shape[1:]:
            size *= dim
        return size

    @property
    def size(self) -> int:
        return self.rows * self.row_size

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor as ``load`` would return it."""
        return self.size * self.dtype.itemsize

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.shape} {self.stored} from {self.origin}>"


class ArrayTensor(LazyTensor):
    """A tensor that is already in memory."""

    def __init__(self, array: Array, *, stored: str | None = None, origin: str = "memory") -> None:
        self.array = array
        self.shape = tuple(array.shape)
        self.dtype = array.dtype
        self.stored = stored or DTYPE_NAMES.get(array.dtype, array.dtype.name)
        self.origin = origin

    def load_rows(self, first: int, last: int) -> Array:
        rows = self.array if self.array.ndim else self.array.reshape(1)
        return np.array(rows[first:last])


class MappedRows(LazyTensor):
    """``source`` with a function applied to each range of its rows; the function keeps the number of rows. ``exact``:
    the same function in float64, where ``function`` rounds."""

    def __init__(
        self,
        source: LazyTensor,
        function: Callable[[Array], Array],
        dtype: DType,
        exact: Callable[[Array], Array] | None = None,
    ) -> None:
        self.source, self.function, self.exact = source, function, exact
        self.shape, self.dtype, self.stored, self.origin = source.shape, np.dtype(dtype), source.stored, source.origin

    def announce(self, first: int = 0, last: int | None = None) -> None:
        self.source.announce(first, last)

    def load_rows(self, first: int, last: int) -> Array:
        return self.function(self.source.load_rows(first, last))

    def load_rows_exact(self, first: int, last: int) -> Array:
        return (
            self.load_rows(first, last) if self.exact is None else self.exact(self.source.load_rows_exact(first, last))
        )


class RowRange(LazyTensor):
    """Rows ``first`` to ``last`` of another tensor, as a tensor."""

    def __init__(self, source: LazyTensor, first: int, last: int) -> None:
        self.source, self.first = source, first
        self.shape = (last - first, *source.shape[1:])
        self.dtype, self.stored, self.origin = source.dtype, source.stored, source.origin

    def announce(self, first: int = 0, last: int | None = None) -> None:
        self.source.announce(self.first + first, self.first + (self.rows if last is None else last))

    def load_rows(self, first: int, last: int) -> Array:
        return self.source.load_rows(self.first + first, self.first + last)


class StackedRows(LazyTensor):
    """Tensors of equal row shape and dtype, concatenated along the rows."""

    def __init__(self, sources: Sequence[LazyTensor]) -> None:
        self.sources = tuple(sources)
        head = self.sources[0]
        if any(source.shape[1:] != head.shape[1:] or source.dtype != head.dtype for source in self.sources):
            raise ValueError(f"cannot stack {self.sources}")
        self.shape = (sum(source.shape[0] for source in self.sources), *head.shape[1:])
        self.dtype, self.stored, self.origin = head.dtype, head.stored, head.origin

    def announce(self, first: int = 0, last: int | None = None) -> None:
        for source, begin, end in self._parts(first, self.rows if last is None else last):
            source.announce(begin, end)

    def load_rows(self, first: int, last: int) -> Array:
        pieces = [source.load_rows(begin, end) for source, begin, end in self._parts(first, last)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _parts(self, first: int, last: int) -> Iterator[tuple[LazyTensor, int, int]]:
        """The sources that have some of these rows, with the range in each."""
        start = 0
        for source in self.sources:
            begin, end = max(first - start, 0), min(last - start, source.shape[0])
            if begin < end:
                yield source, begin, end
            start += source.shape[0]


class _LastRange(threading.local):
    request: tuple[LazyTensor, int, int] | None = None
    rows: Array


class SharedRows(LazyTensor):
    """A tensor that several readers read in step: each thread keeps the range that it read last, of any tensor, for the
    next reader.

    The arrays are read-only, because several readers get them.
    """

    _last = _LastRange()

    def __init__(self, source: LazyTensor) -> None:
        self.source = source
        self.shape, self.dtype, self.stored, self.origin = source.shape, source.dtype, source.stored, source.origin

    @property
    def stored_dtype(self) -> DType:
        return self.source.stored_dtype

    def announce(self, first: int = 0, last: int | None = None) -> None:
        self.source.announce(first, last)

    def load_rows(self, first: int, last: int) -> Array:
        request = (self.source, first, last)
        if self._last.request != request:
            rows = self.source.load_rows(first, last)
            rows.flags.writeable = False
            self._last.request, self._last.rows = request, rows
        return self._last.rows


def equal_values(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors have equal values: bit for bit, or as float32 where their types differ. Reads up to the first
    difference.
    """
    if a.shape != b.shape:
        return False
    ranges = row_ranges(a.rows, a.row_size * a.dtype.itemsize, _COMPARE_BYTES)
    return all(_have_equal_bits(a.load_rows(*rows), b.load_rows(*rows)) for rows in ranges)


def _have_equal_bits(a: Array, b: Array) -> bool:
    if a.dtype != b.dtype:
        a, b = to_float32(a), to_float32(b)
    return np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))


def row_ranges(rows: int, row_bytes: int, chunk_bytes: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Split ``rows`` into ranges of about ``chunk_bytes``. Every range but the last is a multiple of ``multiple`` rows
    long."""
    step = max(chunk_bytes // max(row_bytes, 1) // multiple, 1) * multiple
    for first in range(0, rows, step):
        yield first, min(first + step, rows)
