"""The place beside a destination where its replacement grows.

``.NAME.gemma2tool-staging/`` holds ``lock`` (held by the process that works here; inside it, which process and which NAME),
``new/NAME`` (the output so far), ``journal`` (what of it is complete, where the work can be continued) and, for the instant of a
replacement on systems that cannot swap two names, ``old`` (what the destination held). Only its owner may enter it. Whoever takes
the lock next puts things right after a crash: an ``old`` whose destination is gone goes back; the rest is continued or discarded.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from gemma2tool.errors import ResourceError, ToolError, UsageError
from gemma2tool.storage import staging_journal
from gemma2tool.storage.syscalls import retrying, told

PREFIX, SUFFIX = ".", ".gemma2tool-staging"
LOCK, NEW, OLD = "lock", "new", "old"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NAME_MAX = 255
"""Bytes of a file's name on the usual file systems."""


def folder_name(name: str) -> str:
    """The staging place's name for a destination's; where the file system would not take it, the name is cut and a digest added."""
    whole = f"{PREFIX}{name}{SUFFIX}"
    if len(os.fsencode(whole)) <= _NAME_MAX:
        return whole
    head = os.fsencode(name)[: _NAME_MAX // 2].decode("utf-8", "ignore")
    return f"{PREFIX}{head}~{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}{SUFFIX}"


def exists(destination: str | os.PathLike[str]) -> bool:
    """Whether something is, or may be, staged for this destination."""
    destination = Path(destination)
    return destination.name not in ("", "..") and os.path.lexists(destination.with_name(folder_name(destination.name)))


class StagingPlace:
    """The locked staging place of one destination. All access goes through open folders, so no link planted later is followed."""

    def __init__(self, destination: Path, *, create: bool = True) -> None:
        self.name = destination.name
        self.parent = destination.parent
        self.folder_name = folder_name(self.name)
        self.path = self.parent / self.folder_name
        self.parent_fd = self.fd = self._lock_fd = -1
        self._locked = False
        try:
            self._open(create)
        except BaseException:
            self.remove_if_empty()
            self.close()
            raise

    def _open(self, create: bool) -> None:
        try:
            self.parent_fd = os.open(self.parent, _FOLDER)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UsageError(
                "output.no-parent", f"{self.parent}: no such folder", hint=f"create it first: mkdir -p {self.parent}"
            ) from error
        except OSError:
            with told(self.parent, "opening the folder"):
                raise
        # Another process may remove the place between our steps when it finishes; then we begin again.
        while not self._enter(create):
            self._leave()

    def _enter(self, create: bool) -> bool:
        """Opens and locks the place; False when it vanished meanwhile and must be made again."""
        with told(self.path, "creating the staging folder"):
            if create:
                with suppress(FileExistsError):
                    os.mkdir(self.folder_name, 0o700, dir_fd=self.parent_fd)
            try:
                status = os.stat(self.folder_name, dir_fd=self.parent_fd, follow_symlinks=False)
                if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                    raise ResourceError(
                        "output.staging", f"{self.path}: exists and is not a folder of yours", hint="remove it, then run again"
                    )
                self.fd = os.open(self.folder_name, _FOLDER | os.O_NOFOLLOW, dir_fd=self.parent_fd)
                os.fchmod(self.fd, 0o700)
                self._lock_fd = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
                self._lock()
                # The lock counts only while it is the one that others find.
                lock = self.identity(LOCK, self.fd), self.identity(self.folder_name, self.parent_fd)
            except FileNotFoundError:
                if not create:
                    raise
                return False
            if lock != (_identity(os.fstat(self._lock_fd)), _identity(os.fstat(self.fd))):
                return False
            self._locked = True
            os.ftruncate(self._lock_fd, 0)
            retrying(os.write, self._lock_fd, b"%d\n%s" % (os.getpid(), os.fsencode(self.name)))
        return True

    def _lock(self) -> None:
        try:
            retrying(fcntl.flock, self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._lock_fd, 20, 0).decode("ascii", "replace").partition("\n")[0]
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise ResourceError(
                "output.locked", f"{self.parent / self.name}: {who} is writing this output", hint="wait for it, or end it"
            ) from error
        except OSError as error:
            raise ResourceError(
                "output.no-locks",
                f"{self.path}: this file system cannot lock files: {error.strerror}",
                hint="write to another disk and move the output",
            ) from error

    def identity(self, name: str, fd: int) -> tuple[int, int] | None:
        """(device, inode) of a name in an open folder; None when there is none. Links are not followed."""
        try:
            return _identity(os.stat(name, dir_fd=fd, follow_symlinks=False))
        except FileNotFoundError:
            return None

    def recover(self) -> bool:
        """After a crash: puts an old destination back where it was if nothing took its place. Says whether it did."""
        with told(self.path, "recovering"):
            if self.identity(OLD, self.fd) and not self.identity(self.name, self.parent_fd):
                retrying(os.rename, OLD, self.name, src_dir_fd=self.fd, dst_dir_fd=self.parent_fd)
                return True
        return False

    def discard(self, *, keep_journal: bool = False) -> None:
        """Removes all that is staged, keeping the lock, but never the only copy of an old destination.

        The journal goes last, or stays: as long as it is there, it says what the rest is.
        """
        self.recover()
        with told(self.path, "removing staged files"):
            for name in sorted(os.listdir(self.fd), key=lambda name: name == staging_journal.NAME):
                if name != LOCK and not (keep_journal and name == staging_journal.NAME):
                    remove_tree(name, self.fd)

    def allocated(self) -> int:
        """Bytes that what is staged takes on the disk already."""
        total = 0
        with told(self.path, "measuring staged files"):
            for _, _, names, fd in os.fwalk(dir_fd=self.fd, follow_symlinks=False):
                total += sum(os.stat(name, dir_fd=fd, follow_symlinks=False).st_blocks * 512 for name in names)
        return total

    def remove(self) -> None:
        """Removes the place, as far as it is possible: what is left is found by ``clean``."""
        with suppress(OSError, ToolError):
            self.discard()
            os.unlink(LOCK, dir_fd=self.fd)
            os.rmdir(self.folder_name, dir_fd=self.parent_fd)

    def remove_if_empty(self) -> None:
        """Removes the place where nothing is staged in it."""
        with suppress(OSError):
            if self._locked and os.listdir(self.fd) == [LOCK]:
                os.unlink(LOCK, dir_fd=self.fd)
            if self.parent_fd >= 0:
                os.rmdir(self.folder_name, dir_fd=self.parent_fd)

    def _leave(self) -> None:
        """Closes the place and its lock, which frees it."""
        self._locked = False
        self.fd, fd = -1, self.fd
        self._lock_fd, lock = -1, self._lock_fd
        for number in (lock, fd):
            if number >= 0:
                os.close(number)

    def close(self) -> None:
        self._leave()
        fd, self.parent_fd = self.parent_fd, -1
        if fd >= 0:
            os.close(fd)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def remove_tree(name: str, folder_fd: int) -> None:
    """Removes a file, link or folder by its name in an open folder; links inside are removed, not followed."""
    status = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
    if stat.S_ISDIR(status.st_mode):
        shutil.rmtree(name, dir_fd=folder_fd)
    else:
        os.unlink(name, dir_fd=folder_fd)
