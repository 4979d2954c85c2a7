"""Weights read ahead of their use: a thread reads the next blocks of rows while this one multiplies."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping

import numpy as np

from gemma2tool.model.lazy import LazyTensor, row_ranges

AHEAD_BYTES = 128 << 20
"""How much may have been read and not yet been used."""


class ReadAhead:
    """Blocks of rows of ``tensors``, in that order, read on a background thread.

    The caller takes them in the same order with ``blocks(name)``. Memory: at most ``AHEAD_BYTES`` and one block. What
    reading raises is raised where the block is asked for. Use as a context manager, or ``close`` it: that ends the
    thread.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor], block_bytes: int) -> None:
        self._tensors, self._block_bytes = tensors, block_bytes
        self._changed = threading.Condition()
        self._ready: deque[tuple[str, int, int, np.ndarray | BaseException]] = deque()
        self._held = 0
        self._closed = False
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)
        self._thread.start()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def blocks(self, name: str) -> Iterator[tuple[int, int, np.ndarray]]:
        """First row, end and values of each block of the tensor ``name``, which must be the next in order."""
        last = 0
        while last < self._tensors[name].rows:
            with self._changed:
                self._changed.wait_for(lambda: self._ready)
                found, first, last, values = self._ready.popleft()
                if isinstance(values, BaseException):
                    raise values
                if found != name:
                    raise RuntimeError(f"read ahead {found}, asked for {name}")
                self._held -= values.nbytes
                self._changed.notify_all()
            yield first, last, values

    def _read(self) -> None:
        name, first, last = "", 0, 0
        try:
            for name, tensor in self._tensors.items():
                for first, last in row_ranges(tensor.rows, tensor.row_size * tensor.dtype.itemsize, self._block_bytes):
                    values = tensor.load_rows(first, last)
                    with self._changed:
                        self._changed.wait_for(lambda: self._closed or self._held < AHEAD_BYTES)
                        if self._closed:
                            return
                        self._ready.append((name, first, last, values))
                        self._held += values.nbytes
                        self._changed.notify_all()
        except BaseException as error:  # raised again in the thread that asks for this block
            with self._changed:
                self._ready.append((name, first, last, error))
                self._changed.notify_all()
