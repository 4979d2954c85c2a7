"""What every refusal must fulfill, whichever reader refuses."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import gemma2tool.errors.table  # noqa: F401  (otherwise imported when the first error is raised)
from gemma2tool.errors import InputRefused

MAX_SECONDS = 2.0
_WATCHED = (
    "exec",
    "compile",
    "import",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.",
    "socket.",
    "pickle.",
)
_seen: list[str] | None = None


class Hostile(NamedTuple):
    """A file that must be refused: its bytes and the id of the error."""

    name: str
    data: bytes
    id: str


ValidCheckpoints = Mapping[str, Path]
"""Valid tiny checkpoints by format, to copy and damage."""


@dataclass(frozen=True)
class Case:
    """A hostile checkpoint as a user meets it.

    ``build`` makes it in an empty folder and returns its path. ``id`` is a prefix of the id of the expected error.
    ``options`` are for convert and quantize only; "@" in them is the case's folder.
    """

    name: str
    build: Callable[[Path, ValidCheckpoints], Path]
    id: str
    options: tuple[str, ...] = ()


def as_params(cases: list[Hostile]) -> Any:
    """pytest parameters. The names of the cases must be unique, or one would hide the other."""
    assert len({case.name for case in cases}) == len(cases)
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def _hook(event: str, arguments: tuple) -> None:
    if _seen is None:
        return
    if event.startswith(_WATCHED):
        _seen.append(event)
    elif event == "open" and any(letter in str(arguments[1] or "r") for letter in "wax+"):
        _seen.append(f"open for writing: {arguments[0]}")


sys.addaudithook(_hook)


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Fails if the block imports, compiles or runs code, starts a process, or opens a socket or a file to write."""
    global _seen
    _seen = events = []
    try:
        yield
    finally:
        _seen = None
    assert not events


def assert_refused(call: Callable[[], object], id: str) -> InputRefused:
    """Checks that the call is refused with this id, in one line, in time, with nothing run."""
    error = assert_refused_somehow(call)
    assert error.id == id, error.message
    return error


def assert_refused_somehow(call: Callable[[], object]) -> InputRefused:
    """The same for any id."""
    begin, cpu = time.perf_counter(), time.process_time()
    with nothing_runs(), pytest.raises(InputRefused) as caught:
        call()
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
    error = caught.value
    assert error.message.isprintable()
    assert len(error.message) < 1000
    # Other threads' work and garbage collection of a worker's many objects count too.
    assert cpu_seconds < 4 * MAX_SECONDS
    assert seconds < 10 * MAX_SECONDS  # the machine may be busy, but nothing may wait
    return error
