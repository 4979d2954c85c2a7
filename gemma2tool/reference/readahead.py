"""Blocks of weights, read ahead of their use and used by several threads.

Each thread takes a whole block: reads it (dequantizes it), and later multiplies by it alone. No thread waits for
another within a product, which on a busy machine costs more than the product; and since a block's arithmetic is one
thread's, the result does not depend on how many there are.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch

from gemma2tool.model.lazy import FLOAT32, Array, LazyTensor, row_ranges

AHEAD_BYTES = 128 << 20
"""How much may have been read and not yet been used."""

BLOCK_BYTES = 8 << 20
"""A block's size as float32, whatever it is stored as, so that equal weights are cut alike and give equal bits; small
enough that the widened rows stay in cache."""

Result = TypeVar("Result")


class ReadAhead:
    """Blocks of rows of ``tensors``, read in that order on ``threads`` threads.

    The caller uses the tensors in the same order, each with ``map``. Memory: ``AHEAD_BYTES``, and for each
    thread a block and two results. Use as a context manager, or ``close`` it: that ends the threads.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor], threads: int) -> None:
        self._tensors = tensors
        self._blocks: list[tuple[str, int, int]] = []
        self._span: dict[str, range] = {}
        for name, tensor in tensors.items():
            start = len(self._blocks)
            ranges = row_ranges(tensor.rows, tensor.row_size * FLOAT32.itemsize, BLOCK_BYTES)
            self._blocks += [(name, first, last) for first, last in ranges]
            self._span[name] = range(start, len(self._blocks))
        self._changed = threading.Condition()
        self._closed = False
        self._loaded: dict[int, Array | BaseException] = {}
        self._results: dict[int, object] = {}
        self._held = 0
        self._next_load = self._next_use = self._last_use = self._taken = 0
        self._function: Callable[[int, int, Array], object] | None = None
        self._threads = [threading.Thread(target=self._work, name="read-ahead", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def map(self, name: str, function: Callable[[int, int, Array], Result]) -> Iterator[tuple[int, int, Result]]:
        """``function(first, last, rows)`` of every block of the tensor ``name``, the next in order, on the threads.

        Yields first, last and result in the order of the rows. What reading or the function raises is raised here.
        """
        span = self._span[name]
        if span.start != self._last_use:
            raise RuntimeError(f"{name} is not the next tensor in order")
        with one_thread_each():
            with self._changed:
                self._function, self._next_use, self._last_use, self._taken = (
                    function,
                    span.start,
                    span.stop,
                    span.start,
                )
                self._changed.notify_all()
            for index in span:
                with self._changed:
                    self._changed.wait_for(lambda index=index: index in self._results)
                    result = self._results.pop(index)
                    self._taken = index + 1
                    self._changed.notify_all()
                if isinstance(result, BaseException):
                    raise result
                _, first, last = self._blocks[index]
                yield first, last, result

    def _may_use(self) -> bool:
        near = self._next_use < self._taken + 2 * len(self._threads)
        return near and self._next_use < self._last_use and self._next_use in self._loaded

    def _may_load(self) -> bool:
        return self._next_load < len(self._blocks) and self._held < AHEAD_BYTES

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._may_use() or self._may_load())
                if self._closed:
                    return
                if use := self._may_use():
                    index, self._next_use = self._next_use, self._next_use + 1
                    values, function = self._loaded.pop(index), self._function
                else:
                    index, self._next_load = self._next_load, self._next_load + 1
                    self._held += self._size(index)
            if use:
                self._use(index, values, function)
            else:
                self._load(index)

    def _size(self, index: int) -> int:
        name, first, last = self._blocks[index]
        return (last - first) * self._tensors[name].row_size * self._tensors[name].dtype.itemsize

    def _load(self, index: int) -> None:
        name, first, last = self._blocks[index]
        try:
            values = self._tensors[name].load_rows(first, last)
        except BaseException as error:  # raised again where the block is asked for
            values = error
        with self._changed:
            self._loaded[index] = values
            self._changed.notify_all()

    def _use(self, index: int, values: Array | BaseException, function: Callable) -> None:
        _, first, last = self._blocks[index]
        try:
            result = values if isinstance(values, BaseException) else function(first, last, values)
        except BaseException as error:  # raised again where the result is asked for
            result = error
        with self._changed:
            self._held -= self._size(index)
            self._results[index] = result
            self._changed.notify_all()


_users = 0
_threads_before = 1
_users_lock = threading.Lock()


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Torch's operations on one thread each, until the last who asked for it is done: the setting is global."""
    global _users, _threads_before
    with _users_lock:
        if _users == 0:
            _threads_before = torch.get_num_threads()
            torch.set_num_threads(1)
        _users += 1
    try:
        yield
    finally:
        with _users_lock:
            _users -= 1
            if _users == 0:
                torch.set_num_threads(_threads_before)
