"""Progress events as bars on the terminal."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from gemma2tool.cli.terminal import Console, Later

if TYPE_CHECKING:
    from gemma2tool.api import ProgressEvent
    from gemma2tool.model.progress import ProgressBar


class ProgressDisplay:
    """Receives progress events and shows one bar for each step. Where events say how long the steps are expected to
    take, bars are numbered and say when the whole work will be done.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._expected: tuple[float, ...] = ()  # of all steps since the first that was expected
        self._begun, self._started = 0, 0.0
        self._bars: dict[str, tuple[ExitStack, ProgressBar, int]] = {}

    def __call__(self, event: ProgressEvent) -> None:
        if event.step not in self._bars:
            self._begin(event.expected)
            stack = ExitStack()
            shown = self._console.progress(event.total, self._label(event.step), unit=event.unit, later=self._later())
            self._bars[event.step] = (stack, stack.enter_context(shown), 0)
        stack, bar, done = self._bars[event.step]
        if event.ended:
            del self._bars[event.step]
            stack.close()
        elif event.done > done:
            self._bars[event.step] = (stack, bar, event.done)
            bar.advance(event.done - done, event.name)

    def _begin(self, expected: tuple[float, ...]) -> None:
        """``expected``: of the step that begins now, and of those after it."""
        if not expected:
            self._expected, self._begun = (), 0
        elif expected != self._expected[self._begun :]:
            self._expected, self._begun, self._started = expected, 1, time.monotonic()
        else:
            self._begun += 1

    def _label(self, step: str) -> str:
        return f"{step} ({self._begun} of {len(self._expected)})" if len(self._expected) > 1 else step

    def _later(self) -> Later | None:
        """How long the steps after the one that begins now will take: as much longer or shorter than expected as those
        until its end.
        """
        known, later = sum(self._expected[: self._begun]), sum(self._expected[self._begun :])
        if not later or not known:
            return None
        before = time.monotonic() - self._started
        return lambda seconds: (before + seconds) * later / known
