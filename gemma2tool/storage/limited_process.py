"""Runs a function in a forked process with limits on processor time and memory.

A single call into C code (``"%999999999d"`` in an untrusted template) can take unbounded time and memory, and the
process that makes it cannot stop it.
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

_READ_BYTES = 1 << 16
_WALL_SECONDS_PER_CPU_SECOND = 10
"""Generous, because a busy machine is not the function's fault."""


class LimitExceeded(Exception):
    """The function used up its time, its memory or the space for its answer."""


def is_available() -> bool:
    return hasattr(os, "fork")


def call(function: Callable[[], str], *, cpu_seconds: int, memory_bytes: int, answer_bytes: int) -> str:
    """Returns ``function()``, called in a fork of this process.

    ``memory_bytes`` is in addition to what this process uses. ``answer_bytes`` limits the UTF-8 length of the answer.

    Raises ``LimitExceeded``, also if the fork ends without an answer. Exceptions in ``function`` do not reach the
    caller; it must return its errors as text.
    """
    read_fd, write_fd = os.pipe()
    with warnings.catch_warnings():
        # Python warns that other threads may hold locks. The fork runs none of their code.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _run_child(function, write_fd, cpu_seconds, memory_bytes)
    os.close(write_fd)
    try:
        answer = _read_answer(read_fd, time.monotonic() + _WALL_SECONDS_PER_CPU_SECOND * cpu_seconds, answer_bytes)
    finally:
        os.close(read_fd)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if answer[-1:] != b"\0":
        raise LimitExceeded
    return answer[:-1].decode("utf-8", "surrogatepass")


def _run_child(function: Callable[[], str], write_fd: int, cpu_seconds: int, memory_bytes: int) -> None:
    """Writes the answer and a NUL, then exits without returning, so that nothing of the parent is flushed twice."""
    try:
        _set_limits(cpu_seconds, memory_bytes)
        remaining = memoryview(function().encode("utf-8", "surrogatepass") + b"\0")
        while remaining:
            remaining = remaining[os.write(write_fd, remaining) :]
    finally:
        os._exit(0)


def _set_limits(cpu_seconds: int, memory_bytes: int) -> None:
    import resource

    def lower(name: int, value: int) -> None:
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))

    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    lower(resource.RLIMIT_CORE, 0)
    lower(resource.RLIMIT_CPU, cpu_seconds)
    with suppress(OSError, ValueError):  # no /proc, or no such limit on this system
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        lower(resource.RLIMIT_AS, pages * resource.getpagesize() + memory_bytes)


def _read_answer(read_fd: int, deadline: float, answer_bytes: int) -> bytes:
    answer = bytearray()
    while (seconds_left := deadline - time.monotonic()) > 0 and len(answer) <= answer_bytes:
        if not select.select([read_fd], [], [], seconds_left)[0]:
            break
        data = os.read(read_fd, _READ_BYTES)
        if not data:
            return bytes(answer)
        answer += data
    raise LimitExceeded
