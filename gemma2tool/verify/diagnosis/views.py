"""What a tensor would be after a mistake: views of other tensors that rearrange the rows they read.

A NaN is a value that is not claimed: comparisons leave it out (rows that a shifted table took from outside the source).
"""

from __future__ import annotations

import numpy as np

from gemma2tool.model.lazy import FLOAT32, Array, LazyTensor, row_ranges, to_float32

READ_BYTES = 8 << 20
"""Read at a time where rows are gathered from the whole tensor."""


class View(LazyTensor):
    """A tensor derived from ``source``, of its dtype unless a subclass says otherwise."""

    def __init__(self, source: LazyTensor, shape: tuple[int, ...]) -> None:
        self.source, self.shape = source, tuple(shape)
        self.dtype, self.stored, self.origin = source.dtype, source.stored, source.origin


class Rows(View):
    """Row r is row ``order[r]`` of the source."""

    def __init__(self, source: LazyTensor, order: Array) -> None:
        super().__init__(source, (len(order), *source.shape[1:]))
        self.order = order

    def load_rows(self, first: int, last: int) -> Array:
        rows = self.order[first:last]
        if not len(rows):
            return self.source.load_rows(0, 0)
        low, high = int(rows.min()), int(rows.max()) + 1
        if high - low <= 2 * len(rows):
            span: Array = self.source.load_rows(low, high)[rows - low]
            return span
        starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
        runs = np.split(rows, starts[1:])
        return np.concatenate([self.source.load_rows(int(run[0]), int(run[-1]) + 1) for run in runs])


class Columns(View):
    """Column c is column ``order[c]`` of the source."""

    def __init__(self, source: LazyTensor, order: Array) -> None:
        super().__init__(source, (source.shape[0], len(order)))
        self.order = order

    def load_rows(self, first: int, last: int) -> Array:
        rows: Array = self.source.load_rows(first, last)
        return rows[:, self.order]


class Transposed(View):
    """Equal blocks of rows, each transposed: (blocks * height, columns) becomes (blocks * columns, height)."""

    def __init__(self, source: LazyTensor, blocks: int = 1) -> None:
        rows, columns = source.shape
        super().__init__(source, (blocks * columns, rows // blocks))
        self.height, self.columns = rows // blocks, columns

    def load_rows(self, first: int, last: int) -> Array:
        out: Array = np.empty((last - first, self.height), self.dtype)
        row = first
        while row < last:
            block, column = divmod(row, self.columns)
            end = min(last, (block + 1) * self.columns)
            for low, high in row_ranges(self.height, self.columns * self.dtype.itemsize, READ_BYTES):
                rows = self.source.load_rows(block * self.height + low, block * self.height + high)
                out[row - first : end - first, low:high] = rows[:, column : column + end - row].T
            row = end
        return out


class Reshaped(View):
    """The same values in the same order in another shape."""

    def load_rows(self, first: int, last: int) -> Array:
        width, source_width = self.row_size, self.source.row_size
        low, high = first * width // source_width, -(-last * width // source_width)
        flat: Array = self.source.load_rows(low, high).reshape(-1)
        start = first * width - low * source_width
        return flat[start : start + (last - first) * width].reshape(last - first, *self.shape[1:])


class Shifted(View):
    """Row r is row r + ``by`` of the source; rows from outside the source are NaN. Float32."""

    def __init__(self, source: LazyTensor, by: int, rows: int | None = None) -> None:
        super().__init__(source, (source.shape[0] if rows is None else rows, *source.shape[1:]))
        self.by, self.dtype = by, FLOAT32

    def load_rows(self, first: int, last: int) -> Array:
        out: Array = np.full((last - first, *self.shape[1:]), np.nan, np.float32)
        low, high = max(first + self.by, 0), min(last + self.by, self.source.rows)
        if low < high:
            start = low - self.by - first
            out[start : start + high - low] = to_float32(self.source.load_rows(low, high))
        return out
