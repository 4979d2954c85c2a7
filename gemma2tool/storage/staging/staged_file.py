"""Files of a staged output: created with their final size, then written at offsets."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from gemma2tool.storage.buffers import AnyBuffer, byte_view
from gemma2tool.storage.syscalls import preallocate, retrying, sync_data, translate_os_errors, write_at

_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_REOPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class StagedFile:
    """A staged file of a known size, written at offsets by any number of threads. ``Staging.file`` creates one."""

    def __init__(self, path: Path, size: int, fd: int) -> None:
        self.path = path
        self.size = size
        self._fd = fd
        self._dirty = True  # its size and blocks are not on the disk yet
        self._open = threading.Lock()
        """Held while the descriptor must stay open: one thread may sync the file when another has finished with it."""

    def pwrite(self, offset: int, buffer: AnyBuffer) -> None:
        """Writes ``buffer`` (any contiguous buffer) at byte ``offset``.

        Raises ResourceError if the disk fails or is full.
        """
        view = byte_view(buffer)
        if offset < 0 or offset + len(view) > self.size:
            raise ValueError(f"{self.path}: bytes {offset} to {offset + len(view)} of {self.size}")
        if self._fd < 0:
            raise ValueError(f"{self.path}: written after close")
        with translate_os_errors(self.path, "writing", len(view)):
            write_at(self._fd, view, offset)
        # Set after the write: a concurrent sync resets it, and would otherwise miss this write.
        self._dirty = True

    def sync(self) -> None:
        """Makes what has been written so far durable. Other threads may keep writing."""
        with self._open:
            if self._dirty and self._fd >= 0:
                self._dirty = False
                with translate_os_errors(self.path, "making it durable", self.size):
                    sync_data(self._fd)

    def close(self) -> None:
        """Makes the bytes durable and closes the file."""
        if self._fd >= 0:
            with translate_os_errors(self.path, "making it durable", self.size):
                retrying(os.fsync, self._fd)
            self.abandon()

    def abandon(self) -> None:
        """Closes the file without waiting for the disk."""
        with self._open:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)


def create(parts: Sequence[str], size: int, folder_fd: int) -> int:
    """Creates the file ``parts`` below an open folder, with its parent folders, and returns its descriptor."""
    for depth in range(2, len(parts)):
        with suppress(FileExistsError):
            os.mkdir("/".join(parts[:depth]), 0o777, dir_fd=folder_fd)
    fd = os.open("/".join(parts), _CREATE, 0o666, dir_fd=folder_fd)
    try:
        preallocate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def reopen(parts: Sequence[str], size: int, folder_fd: int) -> int | None:
    """Opens a file that an earlier run left. Returns None if there is none; one of another size is removed."""
    name = "/".join(parts)
    try:
        fd = os.open(name, _REOPEN, dir_fd=folder_fd)
    except FileNotFoundError:
        return None
    if os.fstat(fd).st_size == size:
        return fd
    os.close(fd)
    os.unlink(name, dir_fd=folder_fd)
    return None
