"""Tensors whose rows come in blocks that must be made whole: transposed matrices, chunks of a compressed array.

A block is kept while its rows are being given out, so that it is made once although the rows are asked for in ranges, by several
threads. It goes when each of its rows has been given out once, or when blocks that are wanted more recently need its room.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import OrderedDict

import numpy as np

from gemma2tool.model.lazy import Array, LazyTensor

KEPT_BYTES = 256 << 20
KEPT_BLOCKS = 2
"""Kept whatever their size: the block that is read now and the one after it."""


class _Block:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rows: Array | None = None
        self.given = 0


class _Blocks:
    """The blocks kept by all tensors together, least recently used first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[LazyTensor, int], _Block] = OrderedDict()

    def rows(self, tensor: BlockwiseTensor, index: int, first: int, last: int) -> Array:
        """A fresh array of rows ``first`` to ``last`` of a block, counted from the block's own first row."""
        key = (tensor, index)
        with self._lock:
            block = self._kept.setdefault(key, _Block())
            self._kept.move_to_end(key)
        with block.lock:
            if block.rows is None:
                block.rows = tensor.load_block(index)
                self._make_room()
            rows = block.rows
        result = _copied(rows[first:last])
        with self._lock:
            block.given += last - first
            if block.given >= len(rows):
                self._kept.pop(key, None)
        return result

    def _make_room(self) -> None:
        with self._lock:
            total = sum(block.rows.nbytes for block in self._kept.values() if block.rows is not None)
            while total > KEPT_BYTES and len(self._kept) > KEPT_BLOCKS:
                _, oldest = self._kept.popitem(last=False)
                total -= 0 if oldest.rows is None else oldest.rows.nbytes


_BLOCKS = _Blocks()


class BlockwiseTensor(LazyTensor):
    """``block_rows``: rows of a block; the last one may have fewer."""

    block_rows: int

    @abstractmethod
    def load_block(self, index: int) -> Array:
        """Block ``index`` whole, (rows of the block, ...), in any memory order."""

    def load_rows(self, first: int, last: int) -> Array:
        pieces = []
        while first < last:
            index, start = divmod(first, self.block_rows)
            end = min(self.block_rows, start + last - first)
            pieces.append(_BLOCKS.rows(self, index, start, end))
            first += end - start
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty((0, *self.shape[1:]), self.dtype)


def _copied(rows: Array) -> Array:
    """A row-major copy. Numpy moves integers much faster than types of extensions such as bfloat16."""
    if rows.dtype.itemsize == 2 and rows.dtype.kind not in "iu":
        return np.array(rows.view(np.uint16), order="C").view(rows.dtype)
    return np.array(rows, order="C")
