"""A process that runs one target until its time is over or something happens.

The process may hang, crash or be killed. Its parent reads from shared memory how far it got and with which input.
"""

from __future__ import annotations

import mmap
import os
import resource
import signal
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from gemma2tool.errors import ToolError
from tests.fuzz.base import Target
from tests.fuzz.mutator import MAX_BYTES

MAX_SECONDS = 2.0
MAX_START_SECONDS = 60.0
"""Time for imports and the corpus."""
MAX_BYTES_RESIDENT = 512 << 20
_HEAD = struct.Struct("<QQ")  # executions, length of the input
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
    "ctypes.dlopen",
)
_watching = False
_imports = False


class ForbiddenEvent(BaseException):
    """The reader imported, compiled, ran, connected to or wrote something."""


def _hook(event: str, arguments: tuple) -> None:
    if not _watching or (_imports and event in ("import", "exec", "compile")):
        return
    if event.startswith(_WATCHED) or (event == "open" and any(letter in str(arguments[1] or "r") for letter in "wax+")):
        raise ForbiddenEvent(f"{event}: {arguments[:1]!r}")


class Shared:
    """The number of executions and the current input, in memory shared with the worker."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, _HEAD.size + MAX_BYTES)

    def put(self, count: int, data: bytes) -> None:
        self.memory[16 : 16 + len(data)] = data
        _HEAD.pack_into(self.memory, 0, count, len(data))

    @property
    def count(self) -> int:
        return _HEAD.unpack_from(self.memory)[0]

    @property
    def input(self) -> bytes:
        size = _HEAD.unpack_from(self.memory)[1]
        return self.memory[16 : 16 + size]


@dataclass(frozen=True)
class Finding:
    """An input that did something other than being read or refused."""

    kind: str
    data: bytes


def outcome(target: Target, data: bytes, *, watched: bool = True) -> object:
    """Returns what distinguishes this run: what was understood, or where it was refused. Raises findings."""
    global _watching
    argument = target.place(data)
    if argument is None:
        return None
    _watching = watched
    try:
        return target.run(argument)
    except ToolError as error:
        if not error.message.isprintable() or len(error.message) > 4000 or "." not in error.id:
            raise AssertionError(f"an unfit message: {error.id} {error.message[:200]!r}") from error
        place, trace = hash(error.id), error.__traceback__
        while trace:
            place, trace = hash((place, trace.tb_lineno)), trace.tb_next
        return place
    finally:
        _watching = False


def work(
    target: Target,
    shared: Shared,
    seed: int,
    seconds: float,
    executions: int,
    crash_folder: Path | None,
    *,
    limit_memory: bool = True,
) -> None:
    """Runs until the time or the number of executions is over. Raises what a reader raised.

    ``crash_folder`` is a folder for inputs with new outcomes.
    """
    global _imports
    _imports = target.imports
    target.prepare()
    from gemma2tool.errors import table  # noqa: F401  (imported with the first error)

    "\x1b\udc80\u202e".encode("unicode_escape", "backslashreplace")  # a codec is imported when first needed
    sys.addaudithook(_hook)
    pool = target.seeds() or [b""]
    seen = set()
    for data in pool:
        shared.put(0, data)
        outcome(target, data, watched=False)  # imports on demand
        seen.add(outcome(target, data))
    if crash_folder is not None:
        crash_folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(crash_folder.iterdir()):
            pool.append(path.read_bytes())
            shared.put(0, pool[-1])
            seen.add(outcome(target, pool[-1]))
    if limit_memory:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + MAX_BYTES_RESIDENT, hard))
    rng, draw = Random(seed), Random(seed).random
    end, count = time.monotonic() + seconds, 0
    while count < executions:
        if not count & 63 and time.monotonic() >= end:
            break
        # half of the time from recent outcomes, near which new ones are likely
        recent = draw() < 0.5
        data = target.mutate(
            rng, pool[-1 - int(draw() * min(len(pool), 40))] if recent else pool[int(draw() * len(pool))], pool
        )
        if len(data) > MAX_BYTES:
            continue
        count += 1
        shared.put(count, data)
        result = outcome(target, data)
        if result not in seen:
            seen.add(result)
            if len(data) <= 1 << 14:
                pool.append(data)
                if crash_folder is not None and len(pool) < 3000:
                    (crash_folder / f"{seed:08x}-{count:08x}").write_bytes(data)


def _data_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * mmap.PAGESIZE


def spawn(
    target: Target, shared: Shared, seed: int, seconds: float, executions: int, crash_folder: Path | None, log: Path
) -> int:
    """Forks a worker and returns its process id.

    It exits with 0 when its time is over, or with 1 after writing an exception to ``log``.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.setpgid(0, 0)
        work(target, shared, seed, seconds, executions, crash_folder)
        status = 0
    except BaseException as error:  # whatever it is, the campaign looks for it
        import traceback

        log.write_text(f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}")
    finally:
        os._exit(status)


def watch(pid: int, shared: Shared, log: Path, interrupted: list[bool]) -> tuple[int, Finding | None]:
    """Waits for a worker; kills it if one input takes too long or too much. Returns (executions, what happened)."""
    count, began, waited = -1, 0.0, time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if interrupted:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return shared.count, None
        seconds, resident = _usage(pid)
        if shared.count != count:
            count, began, waited = shared.count, seconds, time.monotonic()
        elif seconds - began > (MAX_SECONDS if count else MAX_START_SECONDS) or time.monotonic() - waited > 120:
            return count, _killed(pid, shared, "hang")
        if resident > MAX_BYTES_RESIDENT:
            return count, _killed(pid, shared, "memory")
        time.sleep(0.05)
    if status == 0:
        return shared.count, None
    if os.WIFSIGNALED(status):
        return shared.count, Finding(f"signal {os.WTERMSIG(status)}", shared.input)
    first = log.read_text().splitlines()[0] if log.exists() else f"status {status}"
    return shared.count, Finding(first, shared.input)


def _killed(pid: int, shared: Shared, kind: str) -> Finding:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return Finding(kind, shared.input)


def _usage(pid: int) -> tuple[float, int]:
    """Returns (seconds of processor time, resident bytes) of a process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0, 0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), int(fields[21]) * mmap.PAGESIZE
