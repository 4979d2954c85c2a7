"""Files beside a staged output that its work needs to continue: intermediate results that are not part of the output.

They are in the folder ``kept`` of the staging place. A file is written under another name, made durable and renamed, so
its name always stands for complete content; a checksum tells damage. They go with the rest of the staging place.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from gemma2tool.storage.buffers import AnyBuffer, byte_view
from gemma2tool.storage.staging.lock import KEPT
from gemma2tool.storage.syscalls import retrying, sync_data, sync_folder, translate_os_errors, write_at

PARTIAL = "partial"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CRC = struct.Struct("<I")
_PIECE = 1 << 24


class KeptFiles:
    """The kept files of a staging place, whose open folder is ``place_fd``."""

    def __init__(self, place_fd: int, path: Path) -> None:
        self.place_fd, self.path = place_fd, path / KEPT

    def names(self) -> list[str]:
        """The files that are complete, sorted."""
        try:
            fd = os.open(KEPT, _FOLDER, dir_fd=self.place_fd)
        except OSError:
            return []
        try:
            return sorted(set(os.listdir(fd)) - {PARTIAL})
        finally:
            os.close(fd)

    def write(self, name: str, buffers: Sequence[AnyBuffer]) -> None:
        """Keep the content of ``buffers`` under ``name``, durably. Raises ResourceError if the disk fails."""
        with translate_os_errors(self.path / name, "keeping", sum(len(byte_view(buffer)) for buffer in buffers)):
            with suppress(FileExistsError):
                os.mkdir(KEPT, 0o700, dir_fd=self.place_fd)
            folder_fd = os.open(KEPT, _FOLDER, dir_fd=self.place_fd)
            try:
                fd = os.open(PARTIAL, _CREATE, 0o600, dir_fd=folder_fd)
                try:
                    _write(fd, buffers)
                    sync_data(fd)
                finally:
                    os.close(fd)
                os.rename(PARTIAL, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
                sync_folder(folder_fd)
                sync_folder(self.place_fd)
            finally:
                os.close(folder_fd)

    def read_into(self, name: str, buffers: Sequence[AnyBuffer]) -> bool:
        """Fill writable ``buffers`` with the content of ``name``. Returns False if there is no such file, or if its
        size or checksum is another; the buffers' content is then undefined.
        """
        try:
            folder_fd = os.open(KEPT, _FOLDER, dir_fd=self.place_fd)
        except OSError:
            return False
        try:
            fd = os.open(name, _READ, dir_fd=folder_fd)
        except OSError:
            return False
        finally:
            os.close(folder_fd)
        try:
            return _read(fd, buffers)
        except OSError:
            return False
        finally:
            os.close(fd)

    def remove(self, name: str) -> None:
        """Remove a kept file, if it exists."""
        with translate_os_errors(self.path / name, "removing"), suppress(FileNotFoundError):
            os.unlink(f"{KEPT}/{name}", dir_fd=self.place_fd)


def _write(fd: int, buffers: Sequence[AnyBuffer]) -> None:
    crc, offset = 0, 0
    for buffer in buffers:
        view = byte_view(buffer)
        crc = zlib.crc32(view, crc)
        write_at(fd, view, offset)
        offset += len(view)
    write_at(fd, memoryview(_CRC.pack(crc)), offset)


def _read(fd: int, buffers: Sequence[AnyBuffer]) -> bool:
    views = [byte_view(buffer) for buffer in buffers]
    if os.fstat(fd).st_size != sum(map(len, views)) + _CRC.size:
        return False
    crc = 0
    for view in views:
        filled = 0
        while filled < len(view):
            count = retrying(os.readv, fd, [view[filled : filled + _PIECE]])
            if count <= 0:
                return False
            filled += count
        crc = zlib.crc32(view, crc)
    return retrying(os.read, fd, _CRC.size) == _CRC.pack(crc)
