"""The place beside a destination where its replacement grows.

``.NAME.gemma2tool-staging/`` holds ``lock`` (held by the process that works here; inside it, which process and which NAME),
``new/NAME`` (the output so far), ``journal`` (what of it is complete, where the work can be continued), for the instant of a
replacement on systems that cannot swap two names ``old`` (what the destination held), and ``aside`` (a file beside the destination
that goes with what it held). Only its owner may enter it. Whoever takes the lock next puts things right after a crash: an ``old``
whose destination is gone goes back; the rest is continued or discarded. A folder that holds anything else is refused as it is.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from gemma2tool.errors import ResourceError, ToolError, UsageError
from gemma2tool.storage.staging import lock as staging_lock
from gemma2tool.storage.staging.lock import ASIDE, JOURNAL, LOCK, NEW, OLD
from gemma2tool.storage.syscalls import retrying, sync_data, translate_os_errors

PREFIX, SUFFIX = ".", ".gemma2tool-staging"
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
        """Makes, or with ``create`` off only takes, the place; nothing in one that is there is changed then, not even its lock's text.

        Raises ResourceError where another process works there, and where it holds anything that is not ours.
        """
        self.name = destination.name
        self.parent = destination.parent
        self.folder_name = folder_name(self.name)
        self.path = self.parent / self.folder_name
        self.parent_fd = self.fd = self._lock_fd = -1
        self._locked = False
        self._foreign = False
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
            with translate_os_errors(self.parent, "opening the folder"):
                raise
        # Another process may remove the place between our steps when it finishes; then we begin again.
        while not self._enter(create):
            self._leave()

    def _enter(self, create: bool) -> bool:
        """Opens and locks the place; False when it vanished meanwhile and must be made again."""
        with translate_os_errors(self.path, f"{'creating' if create else 'opening'} the staging folder"):
            if create:
                with suppress(FileExistsError):
                    os.mkdir(self.folder_name, 0o700, dir_fd=self.parent_fd)
            try:
                status = os.stat(self.folder_name, dir_fd=self.parent_fd, follow_symlinks=False)
                if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                    self._foreign = True
                    raise ResourceError(
                        "output.staging",
                        f"{self.path}: exists and is not a folder of yours",
                        hint="remove it, then run again",
                    )
                self.fd = os.open(self.folder_name, _FOLDER | os.O_NOFOLLOW, dir_fd=self.parent_fd)
                if not self._open_lock(create):
                    return True
                self._lock()
                # The lock counts only while it is the one that others find.
                lock = self.identity(LOCK, self.fd), self.identity(self.folder_name, self.parent_fd)
            except FileNotFoundError:
                if not create:
                    raise
                return False
            if lock != (_identity(os.fstat(self._lock_fd)), _identity(os.fstat(self.fd))):
                return False
            self._refuse(staging_lock.stray(self.fd, self._lock_fd, self.name))
            self._locked = True
            if create:
                os.fchmod(self.fd, 0o700)  # also where the umask took what we need ourselves
                self._sign()
        return True

    def _open_lock(self, create: bool) -> bool:
        """Opens the lock, or makes it where the folder is empty; False where it is, and nothing is to be made."""
        names = os.listdir(self.fd)
        if LOCK not in names:
            self._refuse(min(names, default=None))  # whoever works here makes the lock first and removes it last
            if not create:
                return False
        elif not staging_lock.is_sound(os.stat(LOCK, dir_fd=self.fd, follow_symlinks=False)):
            self._refuse(LOCK)
        self._lock_fd = os.open(LOCK, staging_lock.OPEN_LOCK | (os.O_CREAT if create else 0), 0o600, dir_fd=self.fd)
        if not staging_lock.is_sound(os.fstat(self._lock_fd)):
            self._refuse(LOCK)
        return True

    def _refuse(self, stray: str | None) -> None:
        if stray is not None:
            self._foreign = True
            raise ResourceError(
                "output.staging",
                f"{self.path}: gemma2tool did not put {stray!r} there, so the folder is left as it is",
                hint="move it, or choose another name for the output",
            )

    def _sign(self) -> None:
        """Writes into the lock who holds it. Durable the first time: without it, work that outlives a power failure would look foreign."""
        new = os.fstat(self._lock_fd).st_size == 0
        data = staging_lock.content(self.name)
        if retrying(os.write, self._lock_fd, data) != len(data):
            raise OSError(errno.EIO, "the lock was not written whole")
        if new:
            sync_data(self._lock_fd)

    def _lock(self) -> None:
        try:
            retrying(fcntl.flock, self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            said = staging_lock.read(self._lock_fd)
            who = f"process {said[0]}" if said is not None and said[0] else "another process"
            raise ResourceError(
                "output.locked",
                f"{self.parent / self.name}: {who} is writing this output",
                hint="wait for it, or end it",
            ) from error
        except OSError as error:
            raise ResourceError(
                "output.no-locks",
                f"{self.path}: this file system cannot lock files: {error.strerror}",
                hint="write to another disk and move the output",
            ) from error

    def identity(self, name: str, fd: int) -> tuple[int, int] | None:
        """(device, inode) of a name in an open folder; None when there is none. Links are not followed."""
        status = _status(name, fd)
        return None if status is None else _identity(status)

    def recover(self) -> bool:
        """After a crash: puts an old destination back where it was if nothing took its place. Says whether it did."""
        with translate_os_errors(self.path, "recovering"):
            if self.identity(OLD, self.fd) and not self.identity(self.name, self.parent_fd):
                retrying(os.rename, OLD, self.name, src_dir_fd=self.fd, dst_dir_fd=self.parent_fd)
                return True
        return False

    def discard(self, *, keep_journal: bool = False) -> None:
        """Removes all that runs staged, keeping the lock, but never the only copy of an old destination.

        The journal goes last, or stays: as long as it is there, it says what the rest is.
        """
        self.recover()
        with translate_os_errors(self.path, "removing staged files"):
            for name in (ASIDE, NEW, OLD, *(() if keep_journal else (JOURNAL,))):
                if self.identity(name, self.fd):
                    remove_tree(name, self.fd)

    def allocated(self) -> int:
        """Bytes that what is staged takes on the disk already."""
        total = 0
        with translate_os_errors(self.path, "measuring staged files"):
            for _, _, names, fd in os.fwalk(dir_fd=self.fd, follow_symlinks=False):
                total += sum(os.stat(name, dir_fd=fd, follow_symlinks=False).st_blocks * 512 for name in names)
        return total

    def remove(self) -> None:
        """Removes the place, as far as it is possible: what is left is found by ``clean``."""
        with suppress(OSError, ToolError):
            if self._locked:
                self.discard()
        self.remove_if_empty()

    def remove_if_empty(self) -> None:
        """Removes the place where nothing is staged in it."""
        if self._foreign:
            return
        with suppress(OSError):
            if (self._locked or self._was_interrupted()) and os.listdir(self.fd) == [LOCK]:
                os.unlink(LOCK, dir_fd=self.fd)
        with suppress(OSError):
            if self.parent_fd >= 0:
                os.rmdir(self.folder_name, dir_fd=self.parent_fd)

    def _was_interrupted(self) -> bool:
        """Whether we were stopped between making the lock and holding it: it is empty, and nobody else holds it."""
        if self.fd < 0:
            return False
        if self._lock_fd < 0:
            self._lock_fd = os.open(LOCK, staging_lock.OPEN_LOCK, dir_fd=self.fd)
        status = os.fstat(self._lock_fd)
        if not staging_lock.is_sound(status) or status.st_size or self.identity(LOCK, self.fd) != _identity(status):
            return False
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True

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


def _status(name: str, fd: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def remove_tree(name: str, folder_fd: int) -> None:
    """Removes a file, link or folder by its name in an open folder; links inside are removed, not followed."""
    status = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
    if stat.S_ISDIR(status.st_mode):
        try:
            shutil.rmtree(name, dir_fd=folder_fd)
        except RecursionError as error:
            raise OSError(errno.ELOOP, "its folders are nested too deeply") from error
    else:
        os.unlink(name, dir_fd=folder_fd)
