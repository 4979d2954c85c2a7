"""Notices files that change between the first time and the last time that they are read.

A checkpoint is read in many steps: headers, small files, tensors, once more for a verification. If a file is replaced
or written to in between, what was read belongs to no version of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from gemma2tool.errors import InputRefused

State = tuple[int, str]
"""Size and version."""


class Watch:
    """The files that were opened while it was active, as they were then."""

    def __init__(self) -> None:
        self._files: dict[Path, tuple[State, tuple[int, int], Callable[[], State]]] = {}

    def add(self, path: Path, state: State, look: Callable[[], State]) -> None:
        """Remember a file as it was opened; the first time counts. ``look``: its state when it is called."""
        if path not in self._files:
            self._files[path] = state, _inode(path), look

    def check(self) -> None:
        """Raises InputRefused ``file.changed`` for the first file that is not what it was."""
        for path, (then, inode, look) in self._files.items():
            try:
                now = look()
            except InputRefused:
                raise InputRefused("file.changed", f"{path}: was removed while it was being read") from None
            if now != then or _inode(path) != inode:
                sizes = f" ({then[0]:,} bytes before, {now[0]:,} now)" if now[0] != then[0] else ""
                raise InputRefused("file.changed", f"{path}: changed while it was being read{sizes}")


_active: ContextVar[Watch | None] = ContextVar("watch", default=None)


def active() -> Watch | None:
    """The watch that files opened now are added to."""
    return _active.get()


@contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Add every file that is opened inside the block to ``watch``."""
    before = _active.set(watch)
    try:
        yield watch
    finally:
        _active.reset(before)


def _inode(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino
