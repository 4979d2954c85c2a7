"""System calls that change files, with their failures translated into errors that a user can act on."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from gemma2tool.errors import ResourceError, UsageError

T = TypeVar("T")

_RENAME_EXCHANGE = 2  # linux/fs.h
_NOT_SUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENODEV, errno.ENOTTY}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def translate_os_errors(path: Path, doing: str, nbytes: int = 0) -> Iterator[None]:
    """Turns an OSError in the block into a ToolError that names ``path``, the action and the number of bytes."""
    try:
        yield
    except OSError as error:
        amount = f" ({nbytes} bytes)" if nbytes else ""
        failure = f"{path}: {doing}{amount} failed: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                "disk.full", failure, hint="free space on this disk, or write to another disk"
            ) from error
        if error.errno == errno.EFBIG:
            hint = "raise the limit on file size (ulimit -f), or write to a file system that allows files this large"
            raise ResourceError("disk.file-too-large", failure, hint=hint) from error
        if error.errno == errno.EIO:
            raise ResourceError("disk.io", failure, hint="check the disk, or write to another one") from error
        if error.errno in _DENIED:
            raise ResourceError("output.not-writable", failure, hint="choose a folder you may write to") from error
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError("output.name-too-long", failure, hint="choose a shorter name") from error
        if error.errno in (errno.EMFILE, errno.ENFILE):
            hint = "raise the limit on open files (ulimit -n), or write larger shards"
            raise ResourceError("files.too-many", failure, hint=hint) from error
        raise ResourceError("disk.error", failure) from error


def retrying(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Returns ``call(*args, **kwargs)``, repeated as long as a signal interrupts it."""
    while True:
        try:
            return call(*args, **kwargs)
        except InterruptedError:
            continue


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Writes all of ``data`` at ``offset``, in as many calls as it takes."""
    done = 0
    while done < len(data):
        written = retrying(os.pwrite, fd, data[done:], offset + done)
        if written <= 0:
            raise OSError(errno.EIO, "nothing was written")
        done += written


def free_bytes(place: str | os.PathLike[str] | int) -> int | None:
    """Bytes that may still be written to the disk of ``place``, a path or an open file.

    None where the file system does not say, as some network file systems. Raises OSError if there is no such place.
    """
    disk = os.statvfs(place)
    return disk.f_bavail * disk.f_frsize if disk.f_blocks else None


def preallocate(fd: int, size: int) -> None:
    """Sets the file's size and, if the file system can, allocates its blocks, so a full disk is noticed before any work
    is done.
    """
    if size and hasattr(os, "posix_fallocate"):
        try:
            retrying(os.posix_fallocate, fd, 0, size)
            return
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
    retrying(os.ftruncate, fd, size)


def sync_data(fd: int) -> None:
    """Makes a file's bytes durable, and only the metadata needed to find them (fdatasync)."""
    retrying(getattr(os, "fdatasync", os.fsync), fd)  # macOS has none


def sync_folder(fd: int) -> None:
    """Makes the names in an open folder durable, on file systems that can fsync a folder."""
    try:
        retrying(os.fsync, fd)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


def exchange(src: str, src_fd: int, dst: str, dst_fd: int) -> bool:
    """Swaps two names in one step, so that neither is ever absent.

    Returns False, changing nothing, if the system cannot do this.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    while renameat2(src_fd, os.fsencode(src), dst_fd, os.fsencode(dst), ctypes.c_uint(_RENAME_EXCHANGE)) != 0:
        code = ctypes.get_errno()
        if code in _NOT_SUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True
