"""Mutated files, read by gemma2tool and by the library that defines the container: both refuse, or both find the same.

Each file is read in a forked process, because libraries crash, hang and fill memory on such files; that counts as
refused by the library. What one accepts and the other refuses must be in ``REASONS``. Two readers that accept a file
and find different things are never excused.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from gemma2tool.errors import ToolError
from tests.fuzz.differential_reasons import EVERYWHERE, REASONS
from tests.fuzz.peers import Pair
from tests.fuzz.worker import Shared

MAX_SECONDS = 0.5
"""Of processor time for one file."""
MAX_BYTES = 1 << 30
_SEEDS_OFTEN = 0.7
"""How often a seed is mutated, and not a mutant that both readers accepted."""


@dataclass
class Tally:
    """What happened: how many files both accepted alike, both refused, one refused (by reason), and disagreements."""

    same: int = 0
    refused: int = 0
    excused: Counter[str] = field(default_factory=Counter)
    crashes: int = 0
    disagreements: list[str] = field(default_factory=list)

    @property
    def files(self) -> int:
        return self.same + self.refused + self.excused.total() + len(self.disagreements)

    def line(self, name: str) -> str:
        return (
            f"{name}: {self.files} files, {self.same} read alike, {self.refused} refused by both, "
            f"{self.excused.total()} by one with a reason, {self.crashes} crashes or hangs of the library, "
            f"{len(self.disagreements)} disagreements"
        )


def compare(pair: Pair, seed: int, files: int) -> Tally:
    """Reads ``files`` mutants. A seed always gives the same ones."""
    tally, first, shared = Tally(), 0, Shared()
    while first < files:
        outcomes, status = _batch(pair, seed, range(first, files), shared)
        for outcome in outcomes:
            _count(tally, pair, seed, outcome)
        first += len(outcomes)
        if first < files:  # the library ended the process, or it was ended
            tally.crashes += 1
            _count(
                tally, pair, seed, {"number": first, "theirs": f"crash {status}", "ours": _alone(pair, shared.input)}
            )
            first += 1
    return tally


def mutants(pair: Pair, seed: int, numbers: range) -> Any:
    """The mutants of these numbers; each depends on the seed and its number alone."""
    seeds = pair.seeds()
    for number in numbers:
        rng = Random(f"{seed} {number}")
        data = pair.mutate(rng, rng.choice(seeds), seeds)
        while rng.random() > _SEEDS_OFTEN:
            data = pair.mutate(rng, data, seeds)
        yield number, data


def _batch(pair: Pair, seed: int, numbers: range, shared: Shared) -> tuple[list[dict[str, Any]], int]:
    """The outcomes of a process that reads the mutants until it has read them all or ends otherwise."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        status = 1
        try:
            _work(pair, seed, numbers, writing, shared)
            status = 0
        except BaseException as error:
            os.write(writing, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        finally:
            os._exit(status)
    os.close(writing)
    lines, status = _watched(pid, reading)
    outcomes = [json.loads(line) for line in lines.splitlines() if line.endswith(b"}")]
    if outcomes and "error" in outcomes[-1]:
        raise AssertionError(f"{pair.name}: the harness failed: {outcomes[-1]['error']}")
    return outcomes, status


def _watched(pid: int, reading: int) -> tuple[bytes, int]:
    """What a process wrote until it ended, and its status. It is killed if it takes too long for one file."""
    lines, used, since, done, status = b"", 0.0, time.monotonic(), 0, 0
    os.set_blocking(reading, False)
    while True:
        if not done:
            done, status = os.waitpid(pid, os.WNOHANG)
        try:
            more = os.read(reading, 1 << 20)
        except BlockingIOError:
            more = b""
        lines += more
        seconds = _seconds(pid)
        if more:
            used, since = seconds, time.monotonic()
        elif done:
            os.close(reading)
            return lines, os.waitstatus_to_exitcode(status)
        elif seconds - used > 20 * MAX_SECONDS or time.monotonic() - since > 300:
            os.kill(pid, signal.SIGKILL)
        if not more:
            time.sleep(0.01)


def _seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _TooLong(BaseException):
    pass


def _work(pair: Pair, seed: int, numbers: range, writing: int, shared: Shared) -> None:
    pair.prepare()
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)  # libraries print what they find
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + MAX_BYTES, resource.RLIM_INFINITY))

    def stop(*_: object) -> None:
        raise _TooLong

    signal.signal(signal.SIGPROF, stop)
    for number, data in mutants(pair, seed, numbers):
        shared.put(number, data)
        outcome = {"number": number, **_read(pair, data)}
        os.write(writing, json.dumps(outcome).encode() + b"\n")


def _data_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")


def _read(pair: Pair, data: bytes) -> dict[str, str]:
    """What each reader says of a file: "" and what it found, or why it refuses it."""
    path = pair.place(data)
    found: dict[str, Any] = {}
    outcome = {}
    for side, read in (("ours", pair.ours), ("theirs", pair.theirs)):
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        try:
            found[side] = dict(read(path))
            outcome[side] = ""
        except ToolError as error:
            outcome[side] = f"{error.id}: {error.message}"
        except _TooLong:
            outcome[side] = "hang"
        except Exception as error:
            if side == "ours":
                outcome[side] = f"FAULT {type(error).__name__}: {error}"
            else:
                outcome[side] = f"{type(error).__name__}: {error}".replace("\n", " ")[:3000]
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    if len(found) == 2 and found["ours"] != found["theirs"]:
        outcome["difference"] = _difference(found["ours"], found["theirs"])
    return outcome


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    if ours.keys() != theirs.keys():
        return f"names {sorted(ours.keys() ^ theirs.keys())[:4]!r}"
    name = next(name for name in ours if ours[name] != theirs[name])
    kinds = ("dtype", "shape", "bytes")
    kind = next(kind for kind, a, b in zip(kinds, ours[name], theirs[name], strict=True) if a != b)
    at = kinds.index(kind)
    return f"{kind} of {name!r}: {ours[name][at]!r:.80} and {theirs[name][at]!r:.80}"


def _alone(pair: Pair, data: bytes) -> str:
    """What gemma2tool says of a file at which the library ended the process."""
    pair.prepare()
    try:
        pair.ours(pair.place(data))
    except ToolError as error:
        return f"{error.id}: {error.message}"
    except Exception as error:
        return f"FAULT {type(error).__name__}: {error}"
    return ""


def _count(tally: Tally, pair: Pair, seed: int, outcome: dict[str, Any]) -> None:
    where = f"{pair.name}, seed {seed}, number {outcome['number']}"
    ours, theirs = outcome["ours"], outcome["theirs"]
    if ours.startswith("FAULT") or ours == "hang" or "difference" in outcome:
        tally.disagreements.append(f"{where}: {outcome.get('difference', ours)}")
    elif not ours and not theirs:
        tally.same += 1
    elif ours and theirs:
        tally.refused += 1
    else:
        refusal = f"ours {ours}" if ours else f"theirs {theirs}"
        known = EVERYWHERE | REASONS[pair.name]
        reason = next((text for pattern, text in known.items() if re.match(pattern, refusal)), None)
        if reason is None:
            tally.disagreements.append(f"{where}: only one refuses: {refusal}")
        else:
            tally.excused[reason] += 1
