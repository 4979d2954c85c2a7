"""Reads ahead: a few large ranges of remote files at once, kept in a bounded window of memory.

A *segment* is a range that is fetched as one. Readers say how many bytes they will read next, so that segments end
where the tensor ends and no byte is fetched that is not needed. What is announced waits in a queue and is fetched in
its order as soon as the window has room, so that the connections are busy while rows are encoded and written. Small
reads without such an announcement (headers) are widened, because the next one is usually beside it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from gemma2tool.errors import ToolError
from gemma2tool.sources.fetching import fetch_into
from gemma2tool.sources.remote import Digest, RemoteFile

SEGMENT = 4 << 20
AHEAD = 16 << 20
"""How far ahead of a reader segments are fetched."""
WINDOW = 32 << 20
"""Bytes of all segments together that are kept or being fetched."""
WIDENED = 64 << 10
"""What a smaller read without an announcement is widened to; four times as much where it follows another."""
FETCHERS = 4


@dataclass(eq=False)
class _Segment:
    file: RemoteFile
    start: int
    end: int
    data: Future[bytearray]
    used: int = 0
    left: int = 0
    """Bytes of it that nobody has read yet."""
    is_guess: bool = False
    """Nobody said that all of it will be read."""

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def is_expected(self) -> bool:
        """Whether it is still to be read."""
        return self.left > 0 and not self.is_guess


class _Announced(NamedTuple):
    """A range that will be read, and is not being fetched yet."""

    file: RemoteFile
    start: int
    end: int

    def without(self, file: RemoteFile, start: int, end: int) -> list[_Announced]:
        """What is left of it when ``start`` to ``end`` of ``file`` are fetched."""
        if file is not self.file or end <= self.start or self.end <= start:
            return [self]
        rest = [self._replace(end=start), self._replace(start=end)]
        return [part for part in rest if part.start < part.end]


class ReadAhead:
    """Fetches for all files of a source, with one pool of threads and one window."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.failure: ToolError | None = None
        """The first failure; a reader that detects formats may have swallowed it."""
        self._pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="source")
        self._lock = threading.Lock()
        self._segments: list[_Segment] = []
        self._announced: deque[_Announced] = deque()
        self._clock = 0

    def opener(self, file: RemoteFile) -> Callable[[], _ReadAheadFile]:
        """What opens ``file`` for a reader."""
        return lambda: _ReadAheadFile(self, file)

    def read(self, file: RemoteFile, offset: int, view: memoryview, ahead: int) -> int:
        """Fills ``view`` or a part of it from its start; returns how many bytes."""
        last = min(offset + len(view), file.size)
        if offset >= last:
            return 0
        start, end = offset, min(last + ahead, file.size)
        is_guess = not ahead and len(view) < WIDENED and not self._is_expected(file, offset, last)
        if is_guess:
            start = offset - offset % WIDENED
            end = min(max(start + self._widened(file, start), last), file.size)
        return self._copy(offset, last, view, self._cover(file, start, last, end, is_guess))

    def announce(self, file: RemoteFile, offset: int, nbytes: int) -> None:
        """These bytes will be read after those that were announced before: fetch them when there is room."""
        with self._lock:
            parts = [_Announced(file, offset, min(offset + nbytes, file.size))]
            for known in self._known():
                parts = [rest for part in parts for rest in part.without(known.file, known.start, known.end)]
            self._announced.extend(parts)
            self._fetch_announced()

    def _fetch_announced(self) -> None:
        """Begin segments of what is announced, in its order, until the window is full."""
        while self._announced:
            file, start, end = self._announced[0]
            stop = min(start + SEGMENT, end)
            if not self._make_room(stop - start, [], spare=True):
                return
            self._begin(file, start, stop)

    def close(self) -> None:
        """Ends what is being fetched; nothing may be read any more."""
        with self._lock:
            self.stop.set()
            self._announced.clear()
            self._segments.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _is_expected(self, file: RemoteFile, start: int, end: int) -> bool:
        """Whether these bytes are here, being fetched or announced."""
        with self._lock:
            return any(part.file is file and part.start <= start and end <= part.end for part in self._known())

    def _known(self) -> list[_Announced | _Segment]:
        """Ranges that are here, being fetched or announced."""
        return [*self._announced, *self._segments]

    def _cover(self, file: RemoteFile, start: int, needed: int, end: int, is_guess: bool) -> list[_Segment]:
        """Segments without gaps from ``start`` to at least ``needed``, and as far ahead of it towards ``end`` as the
        window has room for; missing ones are begun.
        """
        covering: list[_Segment] = []
        with self._lock:
            own = sorted((s for s in self._segments if s.file is file), key=lambda s: s.start)
            position = start
            while position < min(needed + AHEAD, end):
                segment = next((s for s in own if s.start <= position < s.end), None)
                if segment is None:
                    following = min((s.start for s in own if s.start > position), default=end)
                    stop = min(position + SEGMENT, following, end)
                    ahead = position >= needed
                    if not self._make_room(stop - position, covering, spare=ahead) and ahead:
                        break
                    segment = self._begin(file, position, stop, is_guess)
                self._clock += 1
                segment.used = self._clock
                covering.append(segment)
                position = segment.end
        return covering

    def _widened(self, file: RemoteFile, start: int) -> int:
        """How much to fetch for a small read: more and more while each follows the one before."""
        with self._lock:
            before = [s.nbytes for s in self._segments if s.file is file and s.end == start]
        return min(max(before, default=WIDENED // 4) * 4, SEGMENT)

    def _begin(self, file: RemoteFile, start: int, end: int, is_guess: bool = False) -> _Segment:
        def fetch() -> bytearray:
            data = bytearray(end - start)
            fetch_into(file, start, memoryview(data), self.stop)
            return data

        self._clock += 1
        segment = _Segment(file, start, end, self._pool.submit(fetch), self._clock, end - start, is_guess)
        self._segments.append(segment)
        if any(known.file is file and known.start < end and start < known.end for known in self._announced):
            self._announced = deque(part for known in self._announced for part in known.without(file, start, end))
        return segment

    def _make_room(self, nbytes: int, kept: list[_Segment], *, spare: bool) -> bool:
        """Forget segments, those that nobody waits for first, then those not used for longest; whether ``nbytes`` fit
        then.

        ``spare``: forget none that is still to be read.
        """
        total = sum(segment.nbytes for segment in self._segments) + nbytes
        for segment in sorted(self._segments, key=lambda segment: (segment.is_expected, segment.used)):
            if total <= WINDOW:
                break
            if segment.data.done() and segment not in kept and not (spare and segment.is_expected):
                self._segments.remove(segment)
                total -= segment.nbytes
                if segment.is_expected:
                    self._announced.clear()  # the reader takes another order: what it announced would be fetched twice
        return total <= WINDOW

    def _copy(self, start: int, end: int, view: memoryview, segments: list[_Segment]) -> int:
        """Copies the bytes ``start`` to ``end`` as far as the first segments reach, waiting for them."""
        position = start
        for segment in segments:
            if segment.start >= end or (position > start and not segment.data.done()):
                break
            if segment.end <= start:
                continue
            try:
                data = segment.data.result()
            except BaseException as failure:
                self._forget(segment, failure)
                raise
            stop = min(segment.end, end)
            view[position - start : stop - start] = memoryview(data)[position - segment.start : stop - segment.start]
            with self._lock:
                segment.left -= stop - position
            position = stop
        with self._lock:
            self._make_room(0, [], spare=False)
            self._fetch_announced()
        return position - start

    def _forget(self, segment: _Segment, failure: BaseException) -> None:
        with self._lock:
            if segment in self._segments:
                self._segments.remove(segment)
            if isinstance(failure, ToolError) and self.failure is None:
                self.failure = failure


class _ReadAheadFile:
    """A remote file as readers see it."""

    def __init__(self, source: ReadAhead, file: RemoteFile) -> None:
        self._source, self._file = source, file
        self.size, self.version = file.size, file.version

    def read_into(self, offset: int, view: memoryview, ahead: int = 0) -> int:
        if offset == 0 and len(view) == self.size and self._file.digest is not None:
            return self._read_whole(view, self._file.digest)
        return self._source.read(self._file, offset, view, ahead)

    def announce(self, offset: int, nbytes: int) -> None:
        self._source.announce(self._file, offset, nbytes)

    def close(self) -> None: ...

    def _read_whole(self, view: memoryview, digest: Digest) -> int:
        done = 0
        while done < len(view):
            done += self._source.read(self._file, done, view[done:], 0)
        content = digest.hasher(self.size)
        content.update(view)
        digest.check(content, self._file.where)
        return done
