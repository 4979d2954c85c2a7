"""Fetching a range of a remote file: attempts again after failures, from the byte where the last one broke off."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from gemma2tool.errors import InputRefused, ResourceError
from gemma2tool.sources.remote import RemoteFile, Transient

logger = logging.getLogger("gemma2tool")

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt while no byte arrives."""
MAX_WAIT = 60.0
"""The longest wait that a server may ask for."""

Result = TypeVar("Result")


class Stopped(Exception):
    """The source was closed while a fetch was waiting."""


def fetch_into(file: RemoteFile, offset: int, view: memoryview, stop: threading.Event) -> None:
    """Fill ``view`` with the bytes of ``file`` from ``offset`` on.

    Raises ResourceError ``source.unreachable`` after several attempts without a byte.
    """
    done = failures = 0
    while done < len(view):
        before = done
        try:
            with file.stream(offset + done, len(view) - done) as pieces:
                for piece in pieces:
                    if done + len(piece) > len(view):
                        raise InputRefused("source.length", f"{file.where}: the server sent more bytes than requested")
                    if stop.is_set():
                        raise Stopped
                    view[done : done + len(piece)] = piece
                    done += len(piece)
            if done < len(view):
                raise Transient(f"the connection ended after {done - before} of {len(view) - before} bytes")
        except Transient as failure:
            failures = 1 if done > before else failures + 1
            _wait(file.where, failure, failures, stop)


def attempt(where: str, call: Callable[[], Result], stop: threading.Event | None = None) -> Result:
    """``call()``, repeated while it raises ``Transient``, as often as ``fetch_into`` would."""
    failures = 0
    while True:
        try:
            return call()
        except Transient as failure:
            failures += 1
            _wait(where, failure, failures, stop or threading.Event())


def _wait(where: str, failure: Transient, failures: int, stop: threading.Event) -> None:
    if failures > len(WAITS):
        raise ResourceError(
            "source.unreachable", f"{where}: could not be read, {failures} attempts failed: {failure}"
        ) from failure
    seconds = max(WAITS[failures - 1], min(failure.wait or 0.0, MAX_WAIT))
    if failures > 1:
        logger.info("%s: %s; attempt %d in %g s", where, failure, failures + 1, seconds)
    if stop.wait(seconds):
        raise Stopped
