"""Ranks that are threads of this process: what torch.distributed does for processes, by a barrier."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gemma2tool.pipeline.ranks.messages import packed, unpacked
from gemma2tool.pipeline.ranks.together import Ranks


class Meeting:
    """Where ``count`` threads exchange bytes."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier = count, threading.Barrier(count, timeout=60)
        self.data: list[bytes] = [b""] * count

    def exchange(self, index: int, data: bytes) -> list[bytes]:
        self.data[index] = data
        self.barrier.wait()
        received = list(self.data)
        self.barrier.wait()
        return received


class ThreadRanks(Ranks):
    def __init__(self, index: int, meeting: Meeting) -> None:
        super().__init__(index, meeting.count)
        self.meeting = meeting

    def _gathered(self, value: Any) -> list[Any]:
        return [unpacked(data) for data in self.meeting.exchange(self.index, packed(value))]

    def _broadcast(self, values: Any, source: int) -> None:
        data = self.meeting.exchange(self.index, packed(values) if source == self.index else b"")
        values.copy_(unpacked(data[source]))


def run_ranks(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """The result of ``work`` on every rank."""
    meeting = Meeting(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda index: work(ThreadRanks(index, meeting)), range(count)))
