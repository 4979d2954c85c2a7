"""What some work takes, as every ``--dry-run`` and the start of every long run say it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma2tool.errors import ResourceError
from gemma2tool.model.devices import CPU
from gemma2tool.pipeline.memory import check_memory, reported_memory
from gemma2tool.storage.units import human_bytes, human_seconds

logger = logging.getLogger("gemma2tool")

LONG_SECONDS = 20.0
"""Work that takes less begins without its estimate."""


@dataclass(frozen=True)
class Least:
    """``memory`` that ``what`` takes, a plural, in any case; ``hint``: how it would take less."""

    memory: int
    what: str
    hint: str


@dataclass(frozen=True)
class Needs:
    """What a run needs.

    - ``steps``: estimated seconds of each step with ``threads`` threads of this machine, without downloads; empty: not
      estimated.
    - ``memory``: approximate peak memory in bytes.
    - ``disk``: the most bytes that are on the disk at one time, both those kept and those needed meanwhile. ``free``:
      free bytes on that disk; None if nothing is written or if this is unknown.
    - ``passes``: how often the ``source_bytes`` bytes of ``source`` are read. ``remote``: they are downloaded each
      time.
    - ``least``: the memory without which the work cannot begin.
    - ``bars``: the same seconds for each progress bar, in order.
    """

    steps: Mapping[str, float]
    memory: int
    threads: int
    disk: int = 0
    free: int | None = None
    source: str = ""
    source_bytes: int = 0
    passes: int = 0
    remote: bool = False
    least: Least | None = None
    bars: tuple[float, ...] = ()

    @property
    def seconds(self) -> float:
        return sum(self.steps.values())

    @property
    def reads(self) -> int:
        """Bytes of the source that all passes over it read."""
        return self.passes * self.source_bytes

    def lines(self) -> list[str]:
        """Return lines for people, beginning with what is most likely to run out."""
        return [line for line in (self._disk(), self._memory(), self._time(), self._download()) if line]

    def check(self, device: str = CPU) -> None:
        """Raise ``ResourceError`` (``memory.exhausted``) if the system cannot provide the least memory. On a ``device``
        other than the CPU, the work takes its memory there.
        """
        if self.least is not None and device == CPU:
            check_memory(self.least.memory, self.least.what, self.least.hint)

    def check_disk(self, place: Path, *, there: int = 0) -> None:
        """Raise ``ResourceError`` (``disk.full``) if the disk of ``place`` lacks the space. ``there``: bytes of the
        same output that an earlier run left.
        """
        if self.free is not None and (lack := self.disk - there - self.free) > 0:
            raise ResourceError(
                "disk.full",
                f"{place}: needs {self.disk - there} bytes, {self.free} are free on its disk",
                hint=f"free another {lack} bytes, or write to another disk",
            )

    def announce(self) -> None:
        """Log what a long run will need."""
        if self.seconds >= LONG_SECONDS or not self.steps:
            for line in self.lines():
                logger.info("%s", line)

    def to_json(self) -> dict[str, object]:
        """Return the needs as JSON types."""
        return {
            "disk_bytes": self.disk,
            "free_bytes": self.free,
            "memory_bytes": self.memory,
            "available_memory_bytes": reported_memory(),
            "seconds": round(self.seconds, 1),
            "steps": {name: round(seconds, 1) for name, seconds in self.steps.items()},
            "threads": self.threads,
            "passes": self.passes,
            "bytes_read": self.reads,
            "downloaded": self.remote,
        }

    def _disk(self) -> str:
        if not self.disk:
            return ""
        room = "" if self.free is None else f" of {human_bytes(self.free)} free"
        return f"disk: {human_bytes(self.disk)}{room}" + _lack(self.disk, self.free)

    def _memory(self) -> str:
        there = reported_memory()
        room = "" if there is None else f", {human_bytes(there)} available"
        return f"memory: about {human_bytes(self.memory)} at its peak{room}" + _lack(self.memory, there)

    def _time(self) -> str:
        if not self.steps:
            return "time: not estimated"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        parts = [f"{name} {human_seconds(seconds)}" for name, seconds in self.steps.items() if seconds >= 1]
        listed = f" ({', '.join(parts)})" if len(parts) > 1 else ""
        more = ", and the time to download" if self.remote else ""
        return f"time: about {human_seconds(max(self.seconds, 1))} with {threads} that nothing else uses{listed}{more}"

    def _download(self) -> str:
        if not self.passes:
            return ""
        times = "once" if self.passes == 1 else f"{self.passes} times"
        if not self.remote:
            return f"reads {self.source} {times} ({human_bytes(self.reads)})"
        once = "" if self.passes == 1 else "; --keep-download FOLDER downloads it once"
        return f"downloads {self.source} {times} ({human_bytes(self.reads)}){once}"


def _lack(needed: int, there: int | None) -> str:
    return "" if there is None or needed <= there else ": NOT ENOUGH"


def together(parts: Sequence[Needs]) -> Needs:
    """Of works that are done one after another, and whose outputs are all kept."""
    steps: dict[str, float] = {}
    for part in parts:
        for name, seconds in part.steps.items():
            steps[name] = steps.get(name, 0.0) + seconds
    sources = list(dict.fromkeys(part.source for part in parts))
    return Needs(
        steps=steps,
        memory=max(part.memory for part in parts),
        threads=parts[0].threads,
        disk=sum(part.disk for part in parts),
        free=min((part.free for part in parts if part.free is not None), default=None),
        source=", ".join(sources),
        source_bytes=sum(part.reads for part in parts) if len(sources) > 1 else parts[0].source_bytes,
        passes=1 if len(sources) > 1 else sum(part.passes for part in parts),
        remote=any(part.remote for part in parts),
        least=max((part.least for part in parts if part.least), key=lambda least: least.memory, default=None),
    )
