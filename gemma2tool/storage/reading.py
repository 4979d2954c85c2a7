"""Reading parts of files by offset, without mapping them into memory.

With ``mmap`` every page read would count towards the peak resident set, and a truncated file would raise SIGBUS.
``pread`` avoids both, and has no shared file position, so several threads can read the same file.
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
from gemma2tool.storage.buffers import AnyBuffer, byte_view
from gemma2tool.storage.quoting import quoted


class FileReader:
    """A regular file opened for reading by offset.

    ``path`` is the path as given, ``size`` the length in bytes when the file was opened. Any number of threads may
    read. Close the reader when all of them have finished.
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
                    "file.not-regular", f"{self.path}: is a {kind}, not a regular file", hint="give the path of a file"
                )
            self.size = status.st_size
            self.identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        except BaseException:
            self.close()
            raise

    def pread_into(self, offset: int, buffer: AnyBuffer) -> None:
        """Fills ``buffer`` (any writable contiguous buffer) with the bytes starting at ``offset``.

        Raises InputRefused ``file.truncated`` if the file ends first.
        """
        view = byte_view(buffer)
        done = 0
        while done < len(view):
            with _translate_read_errors(self.path):
                count = os.preadv(self._descriptor(), [view[done:]], offset + done)
            if count == 0:
                raise InputRefused(
                    "file.truncated",
                    f"{self.path}: ends at byte {offset + done}, but bytes up to {offset + len(view)} are needed",
                    hint="the file is incomplete or was truncated while being read; download it again",
                )
            done += count

    def pread(self, offset: int, nbytes: int) -> bytearray:
        """Returns ``nbytes`` bytes starting at ``offset``.

        Raises InputRefused, before allocating anything, if the file is shorter.
        """
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise InputRefused(
                "file.truncated",
                f"{self.path}: has {self.size} bytes, but bytes {offset} to {offset + nbytes} are needed",
                hint="the file is incomplete; download it again",
            )
        buffer = bytearray(nbytes)
        self.pread_into(offset, buffer)
        return buffer

    def check_unchanged(self) -> None:
        """Raises InputRefused ``file.changed`` if the file's size or modification time changed since it was opened."""
        status = os.fstat(self._descriptor())
        if (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) != self.identity:
            raise InputRefused(
                "file.changed",
                f"{self.path}: changed while it was being read",
                hint="wait until the file is complete, then run the command again",
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
    """Opens a regular file.

    Raises InputRefused, without waiting, if it is missing, unreadable, a folder, a pipe or a device.
    """
    return FileReader(path)


def read_whole(path: str | os.PathLike[str], *, what: str, max_bytes: int) -> bytes:
    """Returns all bytes of a small file such as a config. Raises InputRefused if it has more than ``max_bytes``."""
    with open_for_reading(path) as reader:
        if reader.size > max_bytes:
            raise InputRefused(
                "file.too-large", f"{path}: {what} of {reader.size} bytes; at most {max_bytes} are accepted"
            )
        return bytes(reader.pread(0, reader.size))


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
