"""Reading parts of files by offset, without mapping them.

``mmap`` would count every page read towards the peak resident set and turn a truncated file into SIGBUS; ``pread`` does neither
and needs no shared file position, so several threads can read one file.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from gemma2tool.errors import InputRefused, ResourceError
from gemma2tool.storage.quoting import quoted


class FileReader:
    """A regular file opened for reading by offset.

    ``path`` is the path it was opened by, ``size`` its length in bytes when it was opened. Any number of threads may read; close
    it when they have all finished.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._fd = -1
        self.path = Path(path)
        if "\0" in str(path):
            raise InputRefused("file.missing", f"{quoted(str(path))}: no path has a NUL in it")
        # O_NONBLOCK: opening a FIFO or a device must not wait for its other end.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        with _refusing(self.path):
            self._fd = os.open(self.path, flags)
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                kind = "folder" if stat.S_ISDIR(status.st_mode) else "pipe, socket or device"
                raise InputRefused(
                    "file.not-regular", f"{self.path}: is a {kind}, not a regular file", hint="give the path of a file"
                )
            self.size = status.st_size
            self.identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        except BaseException:
            self.close()
            raise

    def pread_into(self, offset: int, buffer: object) -> None:
        """Fills ``buffer`` (any writable contiguous buffer) from byte ``offset`` on.

        Raises InputRefused ``file.truncated`` when the file ends first.
        """
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            with _refusing(self.path):
                got = os.preadv(self._descriptor(), [view[done:]], offset + done)
            if got == 0:
                raise InputRefused(
                    "file.truncated",
                    f"{self.path}: ends at byte {offset + done}, but bytes up to {offset + len(view)} were to be read",
                    hint="the file is incomplete or was cut while it was being read; download it again",
                )
            done += got

    def pread(self, offset: int, nbytes: int) -> bytearray:
        """The ``nbytes`` bytes from ``offset`` on; refused before anything is allocated when the file is shorter."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise InputRefused(
                "file.truncated",
                f"{self.path}: has {self.size} bytes, but bytes {offset} to {offset + nbytes} were to be read",
                hint="the file is incomplete; download it again",
            )
        buffer = bytearray(nbytes)
        self.pread_into(offset, buffer)
        return buffer

    def check_unchanged(self) -> None:
        """Raises InputRefused ``file.changed`` when the file's size or modification time is no longer what it was at opening."""
        status = os.fstat(self._descriptor())
        if (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) != self.identity:
            raise InputRefused(
                "file.changed",
                f"{self.path}: changed while it was being read",
                hint="wait until it is complete, then run again",
            )

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _descriptor(self) -> int:
        if self._fd < 0:
            raise ValueError(f"{self.path}: read after close")
        return self._fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def open_for_reading(path: str | os.PathLike[str]) -> FileReader:
    """Opens a regular file. Raises InputRefused for a missing or unreadable one, a folder, a pipe or a device (without waiting)."""
    return FileReader(path)


def read_whole(path: str | os.PathLike[str], *, what: str, max_bytes: int) -> bytes:
    """All bytes of a small file such as a config; refused when it has more than ``max_bytes``."""
    with open_for_reading(path) as reader:
        if reader.size > max_bytes:
            raise InputRefused(
                "file.too-large", f"{path}: {what} of {reader.size} bytes; at most {max_bytes} are accepted"
            )
        return bytes(reader.pread(0, reader.size))


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EIO:
            raise ResourceError("file.io", f"{path}: the disk reported a read error", hint="check the disk") from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise InputRefused("file.missing", f"{path}: no such file", hint="check the path") from error
        raise InputRefused("file.unreadable", f"{path}: cannot be read: {error.strerror}") from error
