"""What a tensor would look like after a mistake: views of other tensors that rearrange what they read.

Values that are NaN make no claim: a comparison leaves them out (rows that a shifted table took from nowhere).
"""

from __future__ import annotations

import numpy as np

from gemma2tool.model.lazy import FLOAT32, LazyTensor, row_ranges, to_float32

READ_BYTES = 8 << 20
"""Read at a time where rows are gathered from all over a tensor."""


class View(LazyTensor):
    """A tensor made of ``source``, of its type unless said otherwise."""

    def __init__(self, source: LazyTensor, shape: tuple[int, ...]) -> None:
        self.source, self.shape = source, tuple(shape)
        self.dtype, self.stored, self.origin = source.dtype, source.stored, source.origin


class Rows(View):
    """Row r is row ``order[r]`` of the source."""

    def __init__(self, source: LazyTensor, order: np.ndarray) -> None:
        super().__init__(source, (len(order), *source.shape[1:]))
        self.order = order

    def load_rows(self, first: int, last: int) -> np.ndarray:
        wanted = self.order[first:last]
        if not len(wanted):
            return self.source.load_rows(0, 0)
        low, high = int(wanted.min()), int(wanted.max()) + 1
        if high - low <= 2 * len(wanted):
            return self.source.load_rows(low, high)[wanted - low]
        starts = np.flatnonzero(np.diff(wanted, prepend=wanted[0] - 2) != 1)
        pieces = np.split(wanted, starts[1:])
        return np.concatenate([self.source.load_rows(int(each[0]), int(each[-1]) + 1) for each in pieces])


class Columns(View):
    """Column c is column ``order[c]`` of the source."""

    def __init__(self, source: LazyTensor, order: np.ndarray) -> None:
        super().__init__(source, (source.shape[0], len(order)))
        self.order = order

    def load_rows(self, first: int, last: int) -> np.ndarray:
        return self.source.load_rows(first, last)[:, self.order]


class Transposed(View):
    """Each of ``blocks`` equal blocks of rows transposed: (n * a, b) to (n * b, a)."""

    def __init__(self, source: LazyTensor, blocks: int = 1) -> None:
        rows, columns = source.shape
        super().__init__(source, (blocks * columns, rows // blocks))
        self.height, self.columns = rows // blocks, columns

    def load_rows(self, first: int, last: int) -> np.ndarray:
        out = np.empty((last - first, self.height), self.dtype)
        row = first
        while row < last:
            block, column = divmod(row, self.columns)
            end = min(last, (block + 1) * self.columns)
            for a, b in row_ranges(self.height, self.columns * self.dtype.itemsize, READ_BYTES):
                rows = self.source.load_rows(block * self.height + a, block * self.height + b)
                out[row - first : end - first, a:b] = rows[:, column : column + end - row].T
            row = end
        return out


class Reshaped(View):
    """The same values in the same order under another shape."""

    def __init__(self, source: LazyTensor, shape: tuple[int, ...]) -> None:
        super().__init__(source, shape)

    def load_rows(self, first: int, last: int) -> np.ndarray:
        width, theirs = self.row_size, self.source.row_size
        low, high = first * width // theirs, -(-last * width // theirs)
        flat = self.source.load_rows(low, high).reshape(-1)
        start = first * width - low * theirs
        return flat[start : start + (last - first) * width].reshape(last - first, *self.shape[1:])


class Shifted(View):
    """Row r is row r + ``by`` of the source; rows from beyond its ends make no claim. Float32."""

    def __init__(self, source: LazyTensor, by: int, rows: int | None = None) -> None:
        super().__init__(source, (source.shape[0] if rows is None else rows, *source.shape[1:]))
        self.by, self.dtype = by, FLOAT32

    def load_rows(self, first: int, last: int) -> np.ndarray:
        out = np.full((last - first, *self.shape[1:]), np.nan, np.float32)
        low, high = max(first + self.by, 0), min(last + self.by, self.source.rows)
        if low < high:
            start = low - self.by - first
            out[start : start + high - low] = to_float32(self.source.load_rows(low, high))
        return out
