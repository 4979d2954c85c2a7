"""Ctrl-C and SIGTERM: the stack unwinds as for any other failure, and the process comes to its end.

An exception that a signal raises can come between taking a lock of the standard library's thread pools and releasing
it. A thread then waits for the lock, and the pool for the thread, for ever: so the time for unwinding is limited. What
is staged when it is over stays as after a kill.
"""

from __future__ import annotations

import os
import signal

from gemma2tool.errors import EXIT_INTERRUPTED

SECONDS = 30.0
"""For unwinding; a thread ends its piece of work first."""
_MESSAGE = (
    b"warning: interrupted, and ended by force: the same command continues; 'gemma2tool clean' removes what is left\n"
)


class Terminated(BaseException):
    """Raised on SIGTERM and SIGHUP, so that no partial output is left."""


def install() -> None:
    """Let the signals that end a process unwind it. What the parent ignores stays ignored: nohup, background jobs."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _unwind)


def _unwind(number: int, frame: object) -> None:
    signal.signal(signal.SIGALRM, _end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _end(number: int, frame: object) -> None:
    os.write(2, _MESSAGE)
    os._exit(EXIT_INTERRUPTED)
