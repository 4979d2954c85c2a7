"""The staging place: the folder beside a destination in which its replacement is written.

``.NAME.gemma2tool-staging/`` contains

- ``lock``, held by the process that works here, whose id and NAME it contains;
- ``new/NAME``, the output so far;
- ``journal``, which pieces of it are complete, if the work can be continued;
- ``kept``, intermediate results that the work needs to continue;
- ``old``, what the destination held, only during a replacement on systems that cannot swap two names;
- ``aside``, a file beside the destination that belongs to its old content.

Only its owner may enter it. Whoever takes the lock next cleans up after a crash: an ``old`` whose destination is
missing is moved back, and the rest is continued or discarded. A folder that contains anything else is left as it is,
and its use refused.
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
from gemma2tool.storage.staging.lock import ASIDE, JOURNAL, KEPT, LOCK, NEW, OLD
from gemma2tool.storage.syscalls import retrying, sync_data, translate_os_errors

PREFIX, SUFFIX = ".", ".gemma2tool-staging"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NAME_MAX = 255
"""Bytes in a file name on common file systems."""


def folder_name(name: str) -> str:
    """The name of the staging place for a destination's name.

    A name too long for the file system is cut and a digest appended.
    """
    whole = f"{PREFIX}{name}{SUFFIX}"
    if len(os.fsencode(whole)) <= _NAME_MAX:
        return whole
    head = os.fsencode(name)[: _NAME_MAX // 2].decode("utf-8", "ignore")
    return f"{PREFIX}{head}~{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}{SUFFIX}"


def exists(destination: str | os.PathLike[str]) -> bool:
    """Whether something is, or may be, staged for this destination."""
    destination = Path(destination)
    return destination.name not in ("", "..") and os.path.lexists(destination.with_name(folder_name(destination.name)))


def allocated_bytes(folder: Path) -> int:
    """Bytes that the files in a staging place take on the disk."""
    total = 0
    with suppress(RecursionError):  # folders nested too deeply: what has been counted so far
        for parent, _, names in os.walk(folder):
            for name in set(names) - {LOCK}:
                with suppress(OSError):  # its owner has just removed it
                    total += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return total


class StagingPlace:
    """The locked staging place of one destination.

    It is accessed through open folders, so a link planted later is not followed.
    """

    def __init__(self, destination: Path, *, create: bool = True) -> None:
        """Locks the staging place, making it first with ``create``.

        Without ``create`` nothing in it is changed, not even the lock.

        Raises ResourceError if another process works there or it contains anything that gemma2tool did not write.
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
        # Another process that finishes may remove the place between two steps. Then start over.
        while not self._enter(create):
            self._leave()

    def _enter(self, create: bool) -> bool:
        """Opens and locks the place. Returns False if it vanished meanwhile and must be made again."""
        with translate_os_errors(self.path, f"{'creating' if create else 'opening'} the staging folder"):
            if create:
                with suppress(FileExistsError):
                    os.mkdir(self.folder_name, 0o700, dir_fd=self.parent_fd)
            try:
                self._open_folder()
                if not self._open_lock(create):
                    return True
                self._lock()
                # The lock counts only while it is the one that other processes find.
                current = self.identity(LOCK, self.fd), self.identity(self.folder_name, self.parent_fd)
            except FileNotFoundError:
                if not create:
                    raise
                return False
            if current != (_identity(os.fstat(self._lock_fd)), _identity(os.fstat(self.fd))):
                return False
            self._refuse_entry(staging_lock.foreign_entry(self.fd, self._lock_fd, self.name))
            self._locked = True
            if create:
                os.fchmod(self.fd, 0o700)  # in case the umask removed permissions that are needed here
                self._sign()
        return True

    def _open_folder(self) -> None:
        status = os.stat(self.folder_name, dir_fd=self.parent_fd, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            self._foreign = True
            raise ResourceError(
                "output.staging",
                f"{self.path}: exists and is not a folder that you own",
                hint="remove it, then run the command again",
            )
        self.fd = os.open(self.folder_name, _FOLDER | os.O_NOFOLLOW, dir_fd=self.parent_fd)

    def _open_lock(self, create: bool) -> bool:
        """Opens the lock, or makes it if the folder is empty.

        Returns False if the folder is empty and nothing may be made.
        """
        names = os.listdir(self.fd)
        if LOCK not in names:
            self._refuse_entry(min(names, default=None))  # gemma2tool makes the lock first and removes it last
            if not create:
                return False
        elif not staging_lock.is_sound(os.stat(LOCK, dir_fd=self.fd, follow_symlinks=False)):
            self._refuse_entry(LOCK)
        self._lock_fd = os.open(LOCK, staging_lock.OPEN_LOCK | (os.O_CREAT if create else 0), 0o600, dir_fd=self.fd)
        if not staging_lock.is_sound(os.fstat(self._lock_fd)):
            self._refuse_entry(LOCK)
        return True

    def _refuse_entry(self, entry: str | None) -> None:
        """Raises ResourceError for an entry that gemma2tool did not write; does nothing for None."""
        if entry is not None:
            self._foreign = True
            raise ResourceError(
                "output.staging",
                f"{self.path}: left as it is, because gemma2tool did not create {entry!r} in it",
                hint="move the folder away, or choose a different name for the output",
            )

    def _sign(self) -> None:
        """Writes this process's id into the lock.

        Durable the first time, or work that survives a power failure would look foreign.
        """
        new = os.fstat(self._lock_fd).st_size == 0
        data = staging_lock.content(self.name)
        if retrying(os.write, self._lock_fd, data) != len(data):
            raise OSError(errno.EIO, "the lock was written only partly")
        if new:
            sync_data(self._lock_fd)

    def _lock(self) -> None:
        try:
            retrying(fcntl.flock, self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = staging_lock.read(self._lock_fd)
            process = f"process {owner[0]}" if owner is not None and owner[0] else "another process"
            raise ResourceError(
                "output.locked",
                f"{self.parent / self.name}: {process} is writing this output",
                hint="wait until it finishes, or stop it",
            ) from error
        except OSError as error:
            raise ResourceError(
                "output.no-locks",
                f"{self.path}: this file system cannot lock files: {error.strerror}",
                hint="write to another disk and move the output",
            ) from error

    def identity(self, name: str, fd: int) -> tuple[int, int] | None:
        """(device, inode) of a name in an open folder, or None if there is none. Links are not followed."""
        try:
            return _identity(os.stat(name, dir_fd=fd, follow_symlinks=False))
        except FileNotFoundError:
            return None

    def content_stamp(self, name: str, fd: int) -> tuple[object, ...] | None:
        """What changes when a file, or the files of a folder, are replaced, edited, added or removed: identities, sizes
        and times of modification. None if there is nothing. Links are not followed.
        """
        with translate_os_errors(self.parent / name, "looking at what is there"):
            try:
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if not stat.S_ISDIR(status.st_mode):
                    return (_stamp(status),)
                stamps = [
                    (folder, file, _stamp(os.stat(file, dir_fd=folder_fd, follow_symlinks=False)))
                    for folder, _, files, folder_fd in os.fwalk(name, dir_fd=fd, follow_symlinks=False)
                    for file in files
                ]
            except FileNotFoundError:
                return None
            except RecursionError:  # fwalk's, of folders a thousand deep; the folder itself is still compared
                stamps = []
        return (_identity(status), *sorted(stamps))

    def recover(self) -> bool:
        """After a crash, moves an old destination back if nothing has taken its place. Returns whether it did."""
        with translate_os_errors(self.path, "recovering"):
            if self.identity(OLD, self.fd) and not self.identity(self.name, self.parent_fd):
                retrying(os.rename, OLD, self.name, src_dir_fd=self.fd, dst_dir_fd=self.parent_fd)
                return True
        return False

    def discard(self, *, keep_journal: bool = False) -> None:
        """Removes everything staged except the lock, but never the only copy of an old destination.

        The journal is removed last or kept: while it exists, it says what the rest is.
        """
        self.recover()
        with translate_os_errors(self.path, "removing staged files"):
            for name in (ASIDE, NEW, OLD, KEPT, *(() if keep_journal else (JOURNAL,))):
                if self.identity(name, self.fd):
                    remove_tree(name, self.fd)

    def allocated(self) -> int:
        """Bytes that the staged files already take on the disk."""
        total = 0
        with translate_os_errors(self.path, "measuring staged files"):
            for _, _, names, fd in os.fwalk(dir_fd=self.fd, follow_symlinks=False):
                total += sum(os.stat(name, dir_fd=fd, follow_symlinks=False).st_blocks * 512 for name in names)
        return total

    def remove(self) -> None:
        """Removes the place as far as possible. ``clean`` finds what remains."""
        with suppress(OSError, ToolError):
            if self._locked:
                self.discard()
        self.remove_if_empty()

    def remove_if_empty(self) -> None:
        """Removes the place if nothing is staged in it."""
        if self._foreign:
            return
        with suppress(OSError):
            if (self._locked or self._was_interrupted()) and os.listdir(self.fd) == [LOCK]:
                os.unlink(LOCK, dir_fd=self.fd)
        with suppress(OSError):
            if self.parent_fd >= 0:
                os.rmdir(self.folder_name, dir_fd=self.parent_fd)

    def _was_interrupted(self) -> bool:
        """Whether this process stopped after making the lock and before locking it: it is empty and nobody else holds
        it.
        """
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
        """Closes the place and its lock, which releases it."""
        self._locked = False
        self.fd, fd = -1, self.fd
        self._lock_fd, lock_fd = -1, self._lock_fd
        for descriptor in (lock_fd, fd):
            if descriptor >= 0:
                os.close(descriptor)

    def close(self) -> None:
        self._leave()
        fd, self.parent_fd = self.parent_fd, -1
        if fd >= 0:
            os.close(fd)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return (*_identity(status), status.st_size, status.st_mtime_ns)


def remove_tree(name: str, folder_fd: int) -> None:
    """Removes a file, link or folder by its name in an open folder. Links inside are removed, not followed."""
    status = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
    if stat.S_ISDIR(status.st_mode):
        try:
            shutil.rmtree(name, dir_fd=folder_fd)
        except RecursionError as error:
            raise OSError(errno.ELOOP, "its folders are nested too deeply") from error
    else:
        os.unlink(name, dir_fd=folder_fd)
