"""Progress events as bars on the terminal."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from gemma2tool.cli.terminal import Console

if TYPE_CHECKING:
    from gemma2tool.api import ProgressEvent
    from gemma2tool.model.progress import ProgressBar


class ProgressDisplay:
    """Receives progress events and shows one bar for each step, numbered where the number of ``steps`` is known."""

    def __init__(self, console: Console, steps: int = 0) -> None:
        self._console, self._steps, self._begun = console, steps, 0
        self._bars: dict[str, tuple[ExitStack, ProgressBar, int]] = {}

    def __call__(self, event: ProgressEvent) -> None:
        if event.step not in self._bars:
            stack = ExitStack()
            bar = stack.enter_context(self._console.progress(event.total, self._label(event.step), unit=event.unit))
            self._bars[event.step] = (stack, bar, 0)
        stack, bar, done = self._bars[event.step]
        if event.ended:
            del self._bars[event.step]
            stack.close()
        elif event.done > done:
            self._bars[event.step] = (stack, bar, event.done)
            bar.advance(event.done - done, event.name)

    def _label(self, step: str) -> str:
        self._begun += 1
        return f"{step} ({self._begun} of {self._steps})" if self._begun <= self._steps else step
