"""Lazily loaded tensors: shape and type are known at once, values are read a range of rows at a time.

A *row* is an index of the first axis. Peak memory of everything that streams is set by how many rows are asked for at once, so
nothing here may read more than the rows it was asked for.
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

DTYPE_NAMES = {FLOAT32: "f32", FLOAT16: "f16", BFLOAT16: "bf16", np.dtype(np.float64): "f64"}
"""Names of the floating types as the command line spells them."""

FLOAT_DTYPES = {"f32": FLOAT32, "f16": FLOAT16, "bf16": BFLOAT16}


def to_float32(array: np.ndarray) -> np.ndarray:
    """The values as float32; exact for float16 and bfloat16."""
    if array.dtype == FLOAT32:
        return array
    if array.dtype == BFLOAT16:
        wide = array.view(np.uint16).astype(np.uint32)
        np.left_shift(wide, 16, out=wide)
        return wide.view(FLOAT32)
    return array.astype(FLOAT32)


class LazyTensor(ABC):
    """A tensor whose values stay where they are until rows are asked for.

    ``shape``: the logical shape; ``dtype``: of the arrays that ``load_rows`` returns; ``stored``: how the values are kept at their
    source ("bf16", "q8_0", "nf4", ...); ``origin``: where they are, for messages ("model.ckpt: embedder.weight").
    ``group``: how many neighbouring columns share a quantization scale, None where that is the type's own affair or a whole row.
    Loading is thread-safe.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stored: str
    origin: str
    group: int | None = None

    @abstractmethod
    def load_rows(self, first: int, last: int) -> np.ndarray:
        """Rows ``first`` up to but not including ``last``: shape ``(last - first, *shape[1:])``, a fresh array."""

    def load_rows_exact(self, first: int, last: int) -> np.ndarray:
        """``load_rows``, in float64 where ``dtype`` does not hold what is stored. For comparing bits, and for digests."""
        return self.load_rows(first, last)

    @property
    def stored_dtype(self) -> np.dtype:
        """The float type that an output keeps the values in unless another is asked for: ``dtype``, but for values that were computed
        in a wider one."""
        return self.dtype

    def load(self) -> np.ndarray:
        """All of it; only for tensors known to be small."""
        return self.load_rows(0, self.shape[0]) if self.shape else self.load_rows(0, 1).reshape(())

    def load_rows_f32(self, first: int, last: int) -> np.ndarray:
        """``load_rows`` widened (or, from float64, narrowed) to float32."""
        return to_float32(self.load_rows(first, last))

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_size(self) -> int:
        """Values in a row."""
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
    """A tensor that is already in memory (small ones, and those of tests)."""

    def __init__(self, array: np.ndarray, *, stored: str | None = None, origin: str = "memory") -> None:
        self.array = array
        self.shape = tuple(array.shape)
        self.dtype = array.dtype
        self.stored = stored or DTYPE_NAMES.get(array.dtype, array.dtype.name)
        self.origin = origin

    def load_rows(self, first: int, last: int) -> np.ndarray:
        rows = self.array if self.array.ndim else self.array.reshape(1)
        return np.array(rows[first:last])


class MappedRows(LazyTensor):
    """``source`` with a function applied to each range of its rows; the function keeps the number of rows. ``exact``: the same in
    float64, where ``function`` rounds."""

    def __init__(
        self,
        source: LazyTensor,
        function: Callable[[np.ndarray], np.ndarray],
        dtype: np.dtype,
        exact: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.source, self.function, self.exact = source, function, exact
        self.shape, self.dtype, self.stored, self.origin = source.shape, np.dtype(dtype), source.stored, source.origin

    def load_rows(self, first: int, last: int) -> np.ndarray:
        return self.function(self.source.load_rows(first, last))

    def load_rows_exact(self, first: int, last: int) -> np.ndarray:
        return (
            self.load_rows(first, last) if self.exact is None else self.exact(self.source.load_rows_exact(first, last))
        )


class RowRange(LazyTensor):
    """Rows ``first`` to ``last`` of another tensor, as a tensor of its own."""

    def __init__(self, source: LazyTensor, first: int, last: int) -> None:
        self.source, self.first = source, first
        self.shape = (last - first, *source.shape[1:])
        self.dtype, self.stored, self.origin = source.dtype, source.stored, source.origin

    def load_rows(self, first: int, last: int) -> np.ndarray:
        return self.source.load_rows(self.first + first, self.first + last)


class StackedRows(LazyTensor):
    """Tensors of equal row shape and type, one under the other."""

    def __init__(self, sources: Sequence[LazyTensor]) -> None:
        self.sources = tuple(sources)
        head = self.sources[0]
        if any(each.shape[1:] != head.shape[1:] or each.dtype != head.dtype for each in self.sources):
            raise ValueError(f"cannot stack {self.sources}")
        self.shape = (sum(each.shape[0] for each in self.sources), *head.shape[1:])
        self.dtype, self.stored, self.origin = head.dtype, head.stored, head.origin

    def load_rows(self, first: int, last: int) -> np.ndarray:
        pieces, start = [], 0
        for source in self.sources:
            a, b = max(first - start, 0), min(last - start, source.shape[0])
            if a < b:
                pieces.append(source.load_rows(a, b))
            start += source.shape[0]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class SharedRows(LazyTensor):
    """A tensor that several readers go through in step: the range that a thread read last, of any tensor, is kept for its next reader.

    The arrays are read-only, because others will see them, too.
    """

    _last = threading.local()

    def __init__(self, source: LazyTensor) -> None:
        self.source = source
        self.shape, self.dtype, self.stored, self.origin = source.shape, source.dtype, source.stored, source.origin

    @property
    def stored_dtype(self) -> np.dtype:
        return self.source.stored_dtype

    def load_rows(self, first: int, last: int) -> np.ndarray:
        asked = (self.source, first, last)
        if getattr(self._last, "asked", None) != asked:
            rows = self.source.load_rows(first, last)
            rows.flags.writeable = False
            self._last.asked, self._last.rows = asked, rows
        return self._last.rows


def row_ranges(rows: int, row_bytes: int, chunk_bytes: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Cut ``rows`` into ranges of about ``chunk_bytes``, each but the last a multiple of ``multiple`` rows long."""
    step = max(chunk_bytes // max(row_bytes, 1) // multiple, 1) * multiple
    for first in range(0, rows, step):
        yield first, min(first + step, rows)
