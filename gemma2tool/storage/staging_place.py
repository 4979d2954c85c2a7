"""The place beside a destination where its replacement grows.

``.NAME.gemma2tool-staging/`` holds ``lock`` (held by the process that works here), ``new/NAME`` (the output so far) and, for the
instant of a replacement on systems that cannot swap two names, ``old`` (what the destination held). Only its owner may enter it.
Whoever takes the lock next puts things right after a crash: an ``old`` whose destination is gone goes back, the rest is discarded.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gemma2tool.errors import ResourceError, ToolError, UsageError
from gemma2tool.storage.syscalls import retrying, told

PREFIX, SUFFIX = ".", ".gemma2tool-staging"
LOCK, NEW, OLD = "lock", "new", "old"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class StagingPlace:
    """The locked staging place of one destination. All access goes through open folders, so no link planted later is followed."""

    def __init__(self, destination: Path, *, create: bool = True) -> None:
        self.name = destination.name
        self.parent = destination.parent
        self.folder_name = f"{PREFIX}{self.name}{SUFFIX}"
        self.path = self.parent / self.folder_name
        self.parent_fd = self.fd = self._lock_fd = -1
        self._locked = False
        try:
            self._open(create)
        except BaseException:
            if self._locked:
                self.remove()
            elif self.parent_fd >= 0:
                with suppress(OSError):  # only an empty one goes
                    os.rmdir(self.folder_name, dir_fd=self.parent_fd)
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
            retrying(os.write, self._lock_fd, str(os.getpid()).encode())
        return True

    def _lock(self) -> None:
        try:
            retrying(fcntl.flock, self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._lock_fd, 20, 0).decode("ascii", "replace").strip()
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

    def discard(self) -> None:
        """Removes all that is staged, keeping the lock, but never the only copy of an old destination."""
        self.recover()
        with told(self.path, "removing staged files"):
            for name in os.listdir(self.fd):
                if name != LOCK:
                    remove_tree(name, self.fd)

    def remove(self) -> None:
        """Removes the place, as far as it is possible: what is left is found by ``clean``."""
        with suppress(OSError, ToolError):
            self.discard()
            os.unlink(LOCK, dir_fd=self.fd)
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


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a run that did not finish left: its staging place and the destination it was for.

    ``in_use``: a process is working there, so it was left alone. ``restored``: the old destination was put back.
    """

    path: Path
    destination: Path
    in_use: bool
    restored: bool


def clean(path: str | os.PathLike[str], *, dry_run: bool = False) -> list[Leftover]:
    """Removes what interrupted runs staged beside the destination ``path`` and, when it is a folder, directly inside it.

    Nothing but staging places of this user is touched, and none that is in use. ``dry_run`` only lists them.
    """
    path = Path(path)
    destinations = [path] if path.name not in ("", "..") else []
    if path.is_dir():
        names = sorted(os.listdir(path))
        destinations += [
            path / name[len(PREFIX) : -len(SUFFIX)]
            for name in names
            if name.startswith(PREFIX) and name.endswith(SUFFIX) and len(name) > len(PREFIX + SUFFIX)
        ]
    found = []
    for destination in destinations:
        leftover = _clean_one(destination, dry_run)
        if leftover:
            found.append(leftover)
    return found


def _clean_one(destination: Path, dry_run: bool) -> Leftover | None:
    staged = destination.with_name(f"{PREFIX}{destination.name}{SUFFIX}")
    try:
        status = os.lstat(staged)
    except OSError:
        return None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return None
    try:
        place = StagingPlace(destination, create=False)
    except ResourceError as error:
        if error.id == "output.locked":
            return Leftover(staged, destination, in_use=True, restored=False)
        if isinstance(error.__cause__, FileNotFoundError):  # its owner has just finished
            return None
        raise
    try:
        restored = False
        if not dry_run:
            restored = place.recover()
            place.remove()
        return Leftover(staged, destination, in_use=False, restored=restored)
    finally:
        place.close()
