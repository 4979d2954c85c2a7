"""A text computed in a forked process that the system holds to so much processor time and memory.

Time and memory that one call inside C takes cannot be bounded from within: ``"%999999999d"`` of a stranger's template is one.
"""

from __future__ import annotations

import os
import select
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_PIECE = 1 << 16
_WALL = 10
"""Seconds of the clock to each of the processor: a busy machine is not the text's fault."""


class OutOfBounds(Exception):
    """The time, the memory or the room for the answer was used up."""


def available() -> bool:
    return hasattr(os, "fork")


def compute(text: Callable[[], str], *, seconds: int, memory: int, answer: int) -> str:
    """``text()``, called in a fork of this process. ``seconds`` of processor time, ``memory`` bytes beside what this process has,
    ``answer`` bytes of UTF-8.

    Raises ``OutOfBounds``, also where the fork ends without an answer. ``text`` returns its own errors as text: none comes over.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads' locks: the fork runs none of their code
        child = os.fork()
    if child == 0:
        _serve(text, writing, seconds, memory)
    os.close(writing)
    try:
        received = _received(reading, time.monotonic() + _WALL * seconds, answer)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if received[-1:] != b"\0":
        raise OutOfBounds
    return received[:-1].decode("utf-8", "surrogatepass")


def _serve(text: Callable[[], str], writing: int, seconds: int, memory: int) -> None:
    """What the fork does; it never returns, so nothing of this process is flushed, unlocked or removed twice."""
    try:
        _limit(seconds, memory)
        left = memoryview(text().encode("utf-8", "surrogatepass") + b"\0")
        while left:
            left = left[os.write(writing, left) :]
    finally:
        os._exit(0)


def _limit(seconds: int, memory: int) -> None:
    import resource

    def lower(name: int, value: int) -> None:
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))

    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    lower(resource.RLIMIT_CORE, 0)
    lower(resource.RLIMIT_CPU, seconds)
    with suppress(OSError, ValueError):  # the system has no /proc, or no such limit
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        lower(resource.RLIMIT_AS, pages * resource.getpagesize() + memory)


def _received(reading: int, end: float, answer: int) -> bytes:
    pieces = bytearray()
    while (left := end - time.monotonic()) > 0 and len(pieces) <= answer:
        if not select.select([reading], [], [], left)[0]:
            break
        piece = os.read(reading, _PIECE)
        if not piece:
            return bytes(pieces)
        pieces += piece
    raise OutOfBounds
