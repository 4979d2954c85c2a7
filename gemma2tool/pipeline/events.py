"""Progress as plain events for a callback, made of the bars that the work opens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from gemma2tool.model.progress import Progress


@dataclass(frozen=True)
class ProgressEvent:
    """The progress of a step. Events of one step arrive in order, from any thread.

    - ``step``: what is being done.
    - ``done``, ``total``, ``unit``: how many "bytes", "tokens", "values" or "files" are finished, and of how many; a
      ``total`` of 0 means that it is unknown.
    - ``name``: the current tensor, chunk or file.
    - ``ended``: the step is over, even if an error ended it early.
    - ``expected``: in the first event of a step, the expected seconds of this step and of each step after it, if known.
    """

    step: str
    done: int
    total: int
    unit: str
    name: str = ""
    ended: bool = False
    expected: tuple[float, ...] = ()


ProgressCallback = Callable[[ProgressEvent], None]


def as_progress(callback: ProgressCallback | None) -> Progress | None:
    """The callback as the interface that the work reports to; None without a callback."""
    if callback is None:
        return None

    @contextmanager
    def progress(total: int, label: str, /, unit: str = "bytes", expected: Sequence[float] = ()) -> Iterator[_Bar]:
        bar = _Bar(callback, ProgressEvent(label, 0, total, unit, expected=tuple(expected)))
        callback(bar.last)
        try:
            yield bar
        finally:
            bar.end()

    return progress


class _Bar:
    def __init__(self, callback: ProgressCallback, start: ProgressEvent) -> None:
        self.last = start
        self._callback, self._lock = callback, threading.Lock()

    def advance(self, count: int, name: str = "", /) -> None:
        with self._lock:
            step = self.last
            self.last = ProgressEvent(step.step, step.done + count, step.total, step.unit, name)
            self._callback(self.last)

    def end(self) -> None:
        with self._lock:
            step = self.last
            self._callback(ProgressEvent(step.step, step.done, step.total, step.unit, step.name, ended=True))
