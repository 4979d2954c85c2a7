"""System calls that change files, made to fail where and how a test chooses."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gemma2tool.storage import syscalls

CALLS = (
    "pwrite",
    "write",
    "fsync",
    "fdatasync",
    "rename",
    "replace",
    "unlink",
    "posix_fallocate",
    "ftruncate",
    "open",
    "mkdir",
    "rmdir",
)
RESTARTED = ("pwrite", "fsync", "fdatasync", "rename", "replace", "posix_fallocate")
"""Calls that may fail with EINTR and are repeated by the caller. Elsewhere Python, or ``exchange``, repeats them."""


@dataclass(frozen=True)
class Call:
    """``number`` counts the calls of this name on this target, ``total`` all calls."""

    name: str
    target: str
    number: int
    total: int


class Faults:
    """Makes the calls that ``is_chosen`` selects fail.

    ``kind`` is the name of an errno, ``short`` (writes only a part), ``interrupt``, or ``interrupt after`` the call was
    done. Only calls on paths below ``under`` count, and with ``writing`` an ``open`` counts only if it may write.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        under: Path,
        kind: str,
        is_chosen: Callable[[Call], bool],
        *,
        writing: bool = False,
    ) -> None:
        self.under, self.kind, self.is_chosen, self.writing = str(under), kind, is_chosen, writing
        self.calls: list[Call] = []
        self.fired: list[Call] = []
        self._numbers: Counter[tuple[str, str]] = Counter()
        for name in CALLS:
            monkeypatch.setattr(os, name, self._faulty(name, getattr(os, name)))
        monkeypatch.setattr(syscalls, "exchange", self._faulty("exchange", syscalls.exchange))

    def _faulty(self, name: str, call: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            path = _path(name, args, kwargs)
            if not path.startswith(self.under) or (
                name == "open" and self.writing and not args[1] & (os.O_WRONLY | os.O_RDWR)
            ):
                return call(*args, **kwargs)
            target = path[len(self.under) :]
            self._numbers[name, target] += 1
            this = Call(name, target, self._numbers[name, target], len(self.calls) + 1)
            self.calls.append(this)
            if not self.is_chosen(this):
                return call(*args, **kwargs)
            self.fired.append(this)
            return self._fail(name, call, args, kwargs)

        return run

    def _fail(self, name: str, call: Callable, args: Any, kwargs: Any) -> Any:
        if self.kind == "short" and name == "pwrite":
            return call(args[0], args[1][: max(1, len(args[1]) // 3)], args[2])
        if self.kind == "short" or (self.kind == "EINTR" and name not in RESTARTED):
            return call(*args, **kwargs)
        if self.kind == "interrupt":
            raise KeyboardInterrupt
        if self.kind == "interrupt after":
            call(*args, **kwargs)
            raise KeyboardInterrupt
        raise OSError(getattr(errno, self.kind), os.strerror(getattr(errno, self.kind)))


def _path(name: str, args: Any, kwargs: Any) -> str:
    """The path that a call is about, absolute if that can be known."""
    folder = kwargs.get("dir_fd", kwargs.get("src_dir_fd"))
    if name == "exchange":
        folder, args = args[1], (args[0],)
    if isinstance(args[0], int):
        return os.readlink(f"/proc/self/fd/{args[0]}")
    path = os.fspath(args[0])
    return path if folder is None or os.path.isabs(path) else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
