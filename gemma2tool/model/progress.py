"""How long-running work reports its progress, independent of how it is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Advance = Callable[[int, str], None]
"""``ProgressBar.advance`` as a function: called with the units done since the last call, and the name at hand."""


class ProgressBar(Protocol):
    """The progress of one step."""

    def advance(self, count: int, name: str = "", /) -> None:
        """``count`` more units are done; ``name`` is the tensor or chunk at hand. Any thread may call."""


class Progress(Protocol):
    """Opens a bar for a step of ``total`` units (bytes unless ``unit`` says otherwise); it closes with the context.
    ``expected``: seconds that it and each bar after it are expected to take, where that is known.
    """

    def __call__(
        self, total: int, label: str, /, unit: str = "bytes", expected: Sequence[float] = ()
    ) -> AbstractContextManager[ProgressBar]: ...


class _NullBar:
    def advance(self, count: int, name: str = "", /) -> None:
        pass


def progress_or_null(
    progress: Progress | None, total: int, label: str, /, unit: str = "bytes"
) -> AbstractContextManager[ProgressBar]:
    """A bar of ``progress``, or one that shows nothing."""
    return nullcontext(_NullBar()) if progress is None else progress(total, label, unit=unit)


def expecting(progress: Progress | None, seconds: Sequence[float]) -> Progress | None:
    """``progress`` for work whose bars are expected to take ``seconds`` each, in their order."""
    if progress is None:
        return None
    left = list(seconds)

    def opened(
        total: int, label: str, /, unit: str = "bytes", expected: Sequence[float] = ()
    ) -> AbstractContextManager[ProgressBar]:
        now = tuple(left)
        del left[:1]
        return progress(total, label, unit=unit, expected=expected or now)

    return opened
