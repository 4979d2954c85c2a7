"""Tensors whose rows come in blocks that must be read whole: transposed matrices, compressed chunks.

A block is kept while its rows are being read, so that it is loaded once although several threads ask for ranges of
it. It is dropped when each of its rows has been read once, or when blocks that were used more recently need the
space.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import OrderedDict

import numpy as np

from gemma2tool.model.lazy import Array, LazyTensor

MAX_CACHED_BYTES = 256 << 20
MIN_CACHED_BLOCKS = 2
"""Kept whatever their size: the block that is being read and the one after it."""


class _Block:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rows: Array | None = None
        self.rows_read = 0


class _BlockCache:
    """The blocks of all tensors together, least recently used first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: OrderedDict[tuple[LazyTensor, int], _Block] = OrderedDict()

    def rows(self, tensor: BlockwiseTensor, index: int, first: int, last: int) -> Array:
        """A new array of rows ``first`` to ``last`` of a block, counted from the block's first row."""
        key = (tensor, index)
        with self._lock:
            block = self._blocks.setdefault(key, _Block())
            self._blocks.move_to_end(key)
        with block.lock:
            if block.rows is None:
                block.rows = tensor.load_block(index)
                self._evict()
            rows = block.rows
        copy = _copied(rows[first:last])
        with self._lock:
            block.rows_read += last - first
            if block.rows_read >= len(rows):
                self._blocks.pop(key, None)
        return copy

    def _evict(self) -> None:
        with self._lock:
            total = sum(block.rows.nbytes for block in self._blocks.values() if block.rows is not None)
            while total > MAX_CACHED_BYTES and len(self._blocks) > MIN_CACHED_BLOCKS:
                _, oldest = self._blocks.popitem(last=False)
                total -= 0 if oldest.rows is None else oldest.rows.nbytes


_CACHE = _BlockCache()


class BlockwiseTensor(LazyTensor):
    """``block_rows``: rows of a block; the last block may have fewer."""

    block_rows: int

    @abstractmethod
    def load_block(self, index: int) -> Array:
        """Block ``index`` whole: (rows of the block, ...), in any memory order."""

    def load_rows(self, first: int, last: int) -> Array:
        pieces = []
        while first < last:
            index, start = divmod(first, self.block_rows)
            end = min(self.block_rows, start + last - first)
            pieces.append(_CACHE.rows(self, index, start, end))
            first += end - start
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty((0, *self.shape[1:]), self.dtype)


def _copied(rows: Array) -> Array:
    """A row-major copy. Numpy copies integers much faster than extension types such as bfloat16."""
    if rows.dtype.itemsize == 2 and rows.dtype.kind not in "iu":
        return np.array(rows.view(np.uint16), order="C").view(rows.dtype)
    return np.array(rows, order="C")
