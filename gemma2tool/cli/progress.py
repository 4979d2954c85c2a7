"""Progress events as bars on the terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from gemma2tool.cli.terminal import Console, Later

if TYPE_CHECKING:
    from gemma2tool.api import ProgressEvent
    from gemma2tool.model.progress import ProgressBar


class ProgressDisplay:
    """Receives progress events and shows one bar for each step.

    ``steps``: how long each step is expected to take, in any unit; with them, bars are numbered and say when the whole
    work will be done.
    """

    def __init__(self, console: Console, steps: Sequence[float] = ()) -> None:
        self._console, self._steps, self._begun = console, steps, 0
        self._started = 0.0
        self._bars: dict[str, tuple[ExitStack, ProgressBar, int]] = {}

    def __call__(self, event: ProgressEvent) -> None:
        if event.step not in self._bars:
            self._begun += 1
            if self._begun == 1:
                self._started = time.monotonic()
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

    def _label(self, step: str) -> str:
        return f"{step} ({self._begun} of {len(self._steps)})" if self._begun <= len(self._steps) else step

    def _later(self) -> Later | None:
        """How long the steps after the one that begins now will take: as much longer or shorter than expected as those
        until its end.
        """
        known, later = sum(self._steps[: self._begun]), sum(self._steps[self._begun :])
        if not later:
            return None
        before = time.monotonic() - self._started
        return lambda seconds: (before + seconds) * later / known
