"""Bytes by range: what a reader needs of a file, wherever the file is.

``LocalFile`` is a file of this machine. A source (a hub, an object store, an archive) implements ``RangeFile`` for its
files and attaches them, see ``gemma2tool.storage.attached``.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from gemma2tool.errors import InputRefused, ResourceError
from gemma2tool.storage.quoting import quoted


class RangeFile(Protocol):
    """An open file that is read by offset, by any number of threads.

    ``size``: in bytes, when it was opened. ``version``: a text that is different if the file has changed; runs compare
    it to know whether they may continue.
    """

    size: int
    version: str

    def read_into(self, offset: int, view: memoryview, ahead: int = 0) -> int:
        """Fills ``view``, or a part of it from its start, with the bytes from ``offset`` on; returns how many.

        0 is the end of the file. ``ahead``: how many bytes after these the caller will read next.
        """
        ...

    def announce(self, offset: int, nbytes: int) -> None:
        """These bytes will be read later."""
        ...

    def close(self) -> None: ...


class LocalFile:
    """A regular file of this machine.

    Raises InputRefused, without waiting, if it is missing, unreadable, a folder, a pipe or a device.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._fd = -1
        self.path = Path(path)
        if "\0" in str(path):
            raise InputRefused("file.missing", f"{quoted(str(path))}: a path cannot contain NUL")
        # O_NONBLOCK: opening a FIFO or a device must not wait for the other end.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        with _translate_read_errors(self.path):
            self._fd = os.open(self.path, flags)
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                kind = "folder" if stat.S_ISDIR(status.st_mode) else "pipe, socket or device"
                raise InputRefused(
                    "file.not-regular", f"{self.path}: is a {kind}, not a regular file", hint="pass the path of a file"
                )
            self.size = status.st_size
            self.version = f"changed at {status.st_mtime_ns} ns"
        except BaseException:
            self.close()
            raise

    def read_into(self, offset: int, view: memoryview, ahead: int = 0) -> int:
        with _translate_read_errors(self.path):
            return os.preadv(self._descriptor(), [view], offset)

    def announce(self, offset: int, nbytes: int) -> None: ...

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _descriptor(self) -> int:
        if self._fd < 0:
            raise ValueError(f"{self.path}: read after close")
        return self._fd

    def __del__(self) -> None:
        self.close()


@contextmanager
def _translate_read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EIO:
            raise ResourceError("file.io", f"{path}: the disk reported a read error", hint="check the disk") from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise InputRefused("file.missing", f"{path}: no such file", hint="check the path") from error
        raise InputRefused("file.unreadable", f"{path}: cannot be read: {error.strerror}") from error
