"""Blocks of weights that are read ahead of their use, by several threads.

A thread reads (and dequantizes) a whole block, and a thread multiplies by a whole block. No thread waits for another
within a product, which on a busy machine would cost more than the product; and because one thread computes each block,
the result does not depend on the number of threads.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TypeVar, cast

import torch

from gemma2tool.model.lazy import FLOAT32, Array, LazyTensor, row_ranges

AHEAD_BYTES = 32 << 20
"""The most that may have been read and not yet used, or two blocks for each thread."""

BLOCK_BYTES = 8 << 20
"""A block's size as float32, whatever its stored type, so that equal weights have equal blocks and give equal bits.
Small enough that the rows in float32 stay in cache."""

Result = TypeVar("Result")

BlockFunction = Callable[[int, int, Array], object]
"""Called with the first and last row of a block and its rows."""


class ReadAhead:
    """Blocks of rows of ``tensors``, read in this order on ``threads`` threads.

    The caller uses the tensors in the same order, each with ``map``. Takes ``AHEAD_BYTES`` of memory, and for each
    thread a block and two results. Use as a context manager, or call ``close``, which ends the threads.
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
        self._held, self._limit = 0, max(AHEAD_BYTES, 2 * threads * BLOCK_BYTES)
        self._next_load = self._next_use = self._last_use = self._taken = 0
        self._function: BlockFunction | None = None
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
        """Call ``function(first, last, rows)`` on the threads for every block of the tensor ``name``, which is the next
        in order.

        Yields first, last and result in the order of the rows. Raises what reading or the function raises.
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
                    self._changed.wait_for(partial(self._results.__contains__, index))
                    result = self._results.pop(index)
                    self._taken = index + 1
                    self._changed.notify_all()
                if isinstance(result, BaseException):
                    raise result
                _, first, last = self._blocks[index]
                yield first, last, cast(Result, result)

    def _may_use(self) -> bool:
        near = self._next_use < self._taken + 2 * len(self._threads)
        return near and self._next_use < self._last_use and self._next_use in self._loaded

    def _may_load(self) -> bool:
        return self._next_load < len(self._blocks) and self._held < self._limit

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
            if not use:
                self._load(index)
            elif function is not None:
                self._use(index, values, function)

    def _size(self, index: int) -> int:
        name, first, last = self._blocks[index]
        return (last - first) * self._tensors[name].row_size * self._tensors[name].dtype.itemsize

    def _load(self, index: int) -> None:
        name, first, last = self._blocks[index]
        values: Array | BaseException
        try:
            values = self._tensors[name].load_rows(first, last)
        except BaseException as error:  # raised again by map
            values = error
        with self._changed:
            self._loaded[index] = values
            self._changed.notify_all()

    def _use(self, index: int, values: Array | BaseException, function: BlockFunction) -> None:
        _, first, last = self._blocks[index]
        try:
            result = values if isinstance(values, BaseException) else function(first, last, values)
        except BaseException as error:  # raised again by map
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
    """Run torch's operations on one thread each. The setting is global: it is restored when the last user is done."""
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
