"""Makes complete pieces of a staged output durable and journals them in the background, while other pieces are being
written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from gemma2tool.storage.staging.journal import Journal, Piece

SYNC_BYTES = 64 << 20
SYNC_SECONDS = 0.5
"""Complete pieces are journaled when they have this many bytes or have waited this long: the most work that a kill can
lose.
"""


class Recorder:
    """Takes complete pieces from any thread.

    A background thread calls ``sync``, which makes all written bytes durable, and then writes the pieces to
    ``journal``. An error in that thread is raised by the next call.
    """

    def __init__(self, journal: Journal, sync: Callable[[], None]) -> None:
        self.journal, self.sync = journal, sync
        self.recorded: set[str] = set()
        """Pieces that are in the journal."""
        self._waiting: dict[str, Piece] = {}
        self._bytes = 0
        self._since = 0.0
        self._stop = False
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="gemma2tool-journal", daemon=True)
        self._thread.start()

    def complete(self, name: str, files: tuple[str, ...], record: Any, nbytes: int) -> None:
        """Takes the piece ``name``, all of whose bytes have been written to the system (not yet to the disk)."""
        with self._changed:
            self._raise_failure()
            if not self._waiting:
                self._since = time.monotonic()
            self._waiting[name] = Piece(files, record)
            self._bytes += nbytes
            self._changed.notify()

    def close(self) -> None:
        """Waits until every complete piece is in the journal."""
        self._end()
        self._raise_failure()
        self._record()

    def abandon(self) -> None:
        """Stops without recording the pieces that still wait."""
        self._end()
        self._waiting.clear()

    def _end(self) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify()
        self._thread.join()

    def _raise_failure(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while self._wait():
                self._record()
        except Exception as error:
            self._error = error

    def _wait(self) -> bool:
        """Waits until pieces are due. Returns False when the recorder is stopped."""
        with self._changed:
            while not self._stop:
                seconds_left = self._since + SYNC_SECONDS - time.monotonic() if self._waiting else None
                if seconds_left is not None and (seconds_left <= 0 or self._bytes >= SYNC_BYTES):
                    return True
                self._changed.wait(seconds_left)
        return False

    def _record(self) -> None:
        with self._changed:
            batch, self._waiting, self._bytes = self._waiting, {}, 0
        if batch:
            self.sync()
            self.journal.done(batch)
            self.recorded |= batch.keys()
