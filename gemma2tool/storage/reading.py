"""Reading parts of files by offset, without mapping them into memory.

With ``mmap`` every page read would count towards the peak resident set, and a truncated file would raise SIGBUS.
``pread`` avoids both, and has no shared file position, so several threads can read the same file.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Self

from gemma2tool.errors import InputRefused
from gemma2tool.storage import attached, watching
from gemma2tool.storage.buffers import AnyBuffer, byte_view
from gemma2tool.storage.ranges import LocalFile, RangeFile


class FileReader:
    """A regular file opened for reading by offset: of this machine, or of an attached source.

    ``path`` is the path as given, ``size`` the length in bytes when the file was opened, ``version`` a text that is
    different if the file has changed. Any number of threads may read. Close the reader when all of them have finished.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: RangeFile = attached.open_file(path) or LocalFile(path)
        self.size, self.version = self._file.size, self._file.version
        if (watch := watching.active()) is not None:
            watch.add(self.path, (self.size, self.version), partial(_state, self.path))

    def pread_into(self, offset: int, buffer: AnyBuffer, *, ahead: int = 0) -> None:
        """Fills ``buffer`` (any writable contiguous buffer) with the bytes starting at ``offset``.

        ``ahead``: how many bytes after these will be read next; a source that is far away fetches them meanwhile.
        Raises InputRefused ``file.truncated`` if the file ends first.
        """
        view = byte_view(buffer)
        done = 0
        while done < len(view):
            count = self._file.read_into(offset + done, view[done:], ahead)
            if count == 0:
                raise InputRefused(
                    "file.truncated",
                    f"{self.path}: ends at byte {offset + done}, but bytes up to {offset + len(view)} are needed",
                    hint="the file is incomplete or was truncated while being read; download it again",
                )
            done += count

    def announce(self, offset: int, nbytes: int) -> None:
        """These bytes will be read later; a source that is far away fetches them meanwhile, if it has room."""
        self._file.announce(offset, nbytes)

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

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def open_for_reading(path: str | os.PathLike[str]) -> FileReader:
    """Opens a regular file.

    Raises InputRefused, without waiting, if it is missing, unreadable, a folder, a pipe or a device.
    """
    return FileReader(path)


def _state(path: Path) -> tuple[int, str]:
    with open_for_reading(path) as reader:
        return reader.size, reader.version


def read_whole(path: str | os.PathLike[str], *, what: str, max_bytes: int) -> bytes:
    """Returns all bytes of a small file such as a config. Raises InputRefused if it has more than ``max_bytes``."""
    with open_for_reading(path) as reader:
        if reader.size > max_bytes:
            raise InputRefused(
                "file.too-large", f"{path}: {what} of {reader.size} bytes; at most {max_bytes} are accepted"
            )
        return bytes(reader.pread(0, reader.size))


def starts_with(path: str | os.PathLike[str], magic: bytes) -> bool:
    """Whether a file begins with ``magic``. Raises InputRefused if it cannot be read."""
    with open_for_reading(path) as reader:
        return reader.size >= len(magic) and reader.pread(0, len(magic)) == magic
