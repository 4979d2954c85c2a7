"""Writing an output so that its name holds the whole of it or what it held before, whatever happens in between.

Staged beside the destination, preallocated, written at offsets, fsynced, then renamed; the order is write, fsync of the files,
fsync of their folders, rename, fsync of the parent. Any failure before the end leaves the destination as it was.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from gemma2tool.errors import ResourceError, ToolError, UsageError
from gemma2tool.storage import syscalls
from gemma2tool.storage.paths import refuse_existing
from gemma2tool.storage.staging_place import NEW, OLD, StagingPlace
from gemma2tool.storage.syscalls import preallocate, retrying, sync_folder, told, write_at

_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class StagedFile:
    """A staged file of a known size, written at offsets by any number of threads. Get one from ``Staging.file``."""

    def __init__(self, path: Path, size: int, fd: int) -> None:
        self.path = path
        self.size = size
        self._fd = fd

    def pwrite(self, offset: int, buffer: object) -> None:
        """Writes ``buffer`` (any contiguous buffer) at byte ``offset``. Raises ResourceError when the disk does not take it."""
        view = memoryview(buffer).cast("B")
        if offset < 0 or offset + len(view) > self.size:
            raise ValueError(f"{self.path}: bytes {offset} to {offset + len(view)} of {self.size}")
        if self._fd < 0:
            raise ValueError(f"{self.path}: written after close")
        with told(self.path, "writing", len(view)):
            write_at(self._fd, view, offset)

    def close(self) -> None:
        """Makes the bytes durable and closes the file."""
        if self._fd >= 0:
            with told(self.path, "making it durable", self.size):
                retrying(os.fsync, self._fd)
            self.abandon()

    def abandon(self) -> None:
        """Closes the file without waiting for the disk."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Staging:
    """The staged replacement of ``destination``, a file or (``folder``) a folder; use it in a ``with`` block.

    ``expected_bytes`` must fit on the disk before the first byte is written. Inside the block, create files with ``file`` and
    ``write_bytes``, check what lies at ``path``, and call ``commit``. Leaving the block without that, by an exception of any kind,
    removes what was staged and leaves the destination as it was.

    Raises UsageError when the destination exists and not ``force``, ResourceError for a lock, a full disk, a denied folder.
    """

    def __init__(
        self, destination: str | os.PathLike[str], *, force: bool = False, expected_bytes: int = 0, folder: bool = False
    ) -> None:
        self.destination = Path(destination)
        self.force = force
        self.expected_bytes = expected_bytes
        self.folder = folder
        self._files: list[StagedFile] = []
        self._place: StagingPlace | None = None
        self._new_fd = -1
        self._keep = False

    @property
    def path(self) -> Path:
        """Where the output lies until it is committed: a file or folder with the destination's own name."""
        return self._staging.path / NEW / self.destination.name

    @property
    def _staging(self) -> StagingPlace:
        if self._place is None:
            raise ValueError("not inside the with block")
        return self._place

    def __enter__(self) -> Self:
        self._check_destination()
        self._place = StagingPlace(self.destination)
        try:
            if self._place.recover():
                self._check_destination()
            self._place.discard()
            self._check_space()
            with told(self._place.path, "creating the staging folder"):
                os.mkdir(NEW, 0o777, dir_fd=self._place.fd)
                self._new_fd = os.open(NEW, _FOLDER, dir_fd=self._place.fd)
                if self.folder:
                    os.mkdir(self.destination.name, 0o777, dir_fd=self._new_fd)
        except BaseException:
            self._roll_back()
            raise
        return self

    def _check_destination(self) -> None:
        if self.destination.name in ("", ".."):
            raise UsageError("output.name", f"{self.destination}: not a name for an output", hint="name a file or folder")
        refuse_existing(self.destination, force=self.force, folder=self.folder)

    def _check_space(self) -> None:
        with told(self.destination.parent, "asking for the free space"):
            disk = os.statvfs(self._staging.parent_fd)
        free = disk.f_bavail * disk.f_frsize
        if disk.f_blocks and self.expected_bytes > free:  # some network file systems report nothing at all
            raise ResourceError(
                "disk.full",
                f"{self.destination}: needs {self.expected_bytes} bytes, {free} are free on its disk",
                hint=f"free {self.expected_bytes - free} bytes more, or write to another disk",
            )

    def file(self, relative_name: str, size: int) -> StagedFile:
        """A new staged file of ``size`` bytes; its mode follows the umask.

        ``relative_name`` is a path below a folder destination; for a file destination it is the destination's own name.
        """
        parts = PurePosixPath(relative_name).parts
        if not parts or ".." in parts or parts[0] == "/" or (not self.folder and parts != (self.destination.name,)):
            raise ValueError(f"{relative_name!r} is not a name inside {self.destination}")
        if self.folder:
            parts = (self.destination.name, *parts)
        path = self._staging.path.joinpath(NEW, *parts)
        fd = -1
        try:
            with told(path, "creating the file", size):
                for depth in range(2, len(parts)):
                    try:
                        os.mkdir("/".join(parts[:depth]), 0o777, dir_fd=self._new_fd)
                    except FileExistsError:
                        pass
                fd = os.open("/".join(parts), _CREATE, 0o666, dir_fd=self._new_fd)
                preallocate(fd, size)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        staged = StagedFile(path, size, fd)
        self._files.append(staged)
        return staged

    def write_bytes(self, relative_name: str, data: bytes) -> None:
        """A staged file that holds ``data``."""
        staged = self.file(relative_name, len(data))
        staged.pwrite(0, data)
        staged.close()

    def commit(self) -> None:
        """Makes the staged output durable and puts it at the destination; the old one is removed after that.

        Raises ResourceError when the disk fails; the destination is then as it was.
        """
        for staged in self._files:
            staged.close()
        self._sync_folders()
        self._put_in_place()
        self._finish()

    def _sync_folders(self) -> None:
        with told(self.path, "making the folder durable"):
            if self.folder:
                for _, _, _, fd in os.fwalk(self.destination.name, dir_fd=self._new_fd, follow_symlinks=False):
                    sync_folder(fd)
            sync_folder(self._new_fd)

    def _put_in_place(self) -> None:
        place, name = self._staging, self.destination.name
        new = place.identity(name, self._new_fd)
        if new is None:
            raise ValueError(f"{self.destination}: nothing was staged")
        try:
            self._check_destination()
            with told(self.destination, "moving the finished output into place"):
                if place.identity(name, place.parent_fd) is None:
                    retrying(os.rename, name, name, src_dir_fd=self._new_fd, dst_dir_fd=place.parent_fd)
                elif not syscalls.exchange(name, self._new_fd, name, place.parent_fd):
                    retrying(os.rename, name, OLD, src_dir_fd=place.parent_fd, dst_dir_fd=place.fd)
                    retrying(os.rename, name, name, src_dir_fd=self._new_fd, dst_dir_fd=place.parent_fd)
                sync_folder(place.parent_fd)
        except BaseException as error:
            self._put_back(new, error)
            raise

    def _put_back(self, new: tuple[int, int], cause: BaseException) -> None:
        """Undoes as much of ``_put_in_place`` as was done, judging by what lies where."""
        place, name = self._staging, self.destination.name
        try:
            if place.identity(name, place.parent_fd) == new:
                if place.identity(name, self._new_fd):  # the old one: they were swapped
                    syscalls.exchange(name, self._new_fd, name, place.parent_fd)
                else:
                    retrying(os.rename, name, name, src_dir_fd=place.parent_fd, dst_dir_fd=self._new_fd)
            place.recover()
        except (OSError, ToolError):
            # What is in the staging place may be the only copy of the old output: the next run or `clean` decides.
            self._keep = True
            cause.add_note(f"the old output may be inside {place.path}")

    def _finish(self) -> None:
        self._close()
        self._staging.remove()
        self._staging.close()
        self._place = None

    def _roll_back(self) -> None:
        for staged in self._files:
            staged.abandon()
        self._close()
        if self._place is not None:
            if not self._keep:
                self._place.remove()
            self._place.close()
            self._place = None

    def _close(self) -> None:
        self._files.clear()
        fd, self._new_fd = self._new_fd, -1
        if fd >= 0:
            os.close(fd)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._place is not None:
            self._roll_back()
