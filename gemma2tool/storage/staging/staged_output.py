"""Writing an output so that its name holds the whole of it or what it held before, whatever happens in between.

Staged beside the destination, preallocated, written at offsets, fsynced, then renamed; the order is write, fsync of the files,
fsync of their folders, rename, fsync of the parent. Any failure before the end leaves the destination as it was. With a fingerprint
the staged output survives a kill, and the next run with the same fingerprint goes on with it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from gemma2tool.errors import ResourceError, ToolError, UsageError
from gemma2tool.storage import syscalls
from gemma2tool.storage.paths import refuse_existing
from gemma2tool.storage.staging import journal as staging_journal
from gemma2tool.storage.staging import place as staging_place
from gemma2tool.storage.staging import resume as staging_resume
from gemma2tool.storage.staging.journal import Fingerprint, Found, Journal
from gemma2tool.storage.staging.lock import ASIDE, NEW, OLD
from gemma2tool.storage.staging.place import StagingPlace, remove_tree
from gemma2tool.storage.staging.recorder import Recorder
from gemma2tool.storage.staging.resume import State
from gemma2tool.storage.syscalls import preallocate, retrying, sync_data, sync_folder, translate_os_errors, write_at

_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_REOPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class StagedFile:
    """A staged file of a known size, written at offsets by any number of threads. Get one from ``Staging.file``."""

    def __init__(self, path: Path, size: int, fd: int) -> None:
        self.path = path
        self.size = size
        self._fd = fd
        self._dirty = True  # its size and blocks are not on the disk yet
        self._open = threading.Lock()
        """Held by whoever needs the descriptor to stay: one thread may make durable what another is done with."""

    def pwrite(self, offset: int, buffer: object) -> None:
        """Writes ``buffer`` (any contiguous buffer) at byte ``offset``. Raises ResourceError when the disk does not take it."""
        view = memoryview(buffer).cast("B")
        if offset < 0 or offset + len(view) > self.size:
            raise ValueError(f"{self.path}: bytes {offset} to {offset + len(view)} of {self.size}")
        if self._fd < 0:
            raise ValueError(f"{self.path}: written after close")
        with translate_os_errors(self.path, "writing", len(view)):
            write_at(self._fd, view, offset)
        self._dirty = True  # only now: whoever makes it durable between sets it back, and would miss this write

    def sync(self) -> None:
        """Makes what has been written so far durable; writing may go on meanwhile."""
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


class Staging:
    """The staged replacement of ``destination``, a file or (``folder``) a folder; use it in a ``with`` block.

    ``expected_bytes`` must fit on the disk before the first byte is written. Inside the block, create files with ``file`` and
    ``write_bytes``, check what lies at ``path``, and call ``commit``. Leaving the block without that, by an exception of any kind,
    removes what was staged and leaves the destination as it was.

    With a ``fingerprint`` (what must be the same for the bytes to be the same) the work can be continued: pieces reported with
    ``complete`` are journaled once they are durable; they stay when the process is killed or interrupted, or the machine fails it
    (ResourceError, UsageError, MemoryError). The next ``Staging`` with that fingerprint says in ``completed`` which pieces it found.
    One with another refuses, unless ``restart``. ``finished``: an earlier run was killed after its output was in place; there is
    nothing left to do but ``commit``.

    Raises UsageError when the destination exists and not ``force``, and for staged work of another fingerprint; ResourceError for
    a lock, a full disk, a denied folder.
    """

    def __init__(
        self,
        destination: str | os.PathLike[str],
        *,
        force: bool = False,
        expected_bytes: int = 0,
        folder: bool = False,
        fingerprint: Fingerprint | None = None,
        restart: bool = False,
    ) -> None:
        self.destination = Path(destination)
        self.force = force
        self.expected_bytes = expected_bytes
        self.folder = folder
        self.fingerprint = fingerprint
        self.restart = restart
        self.finished = False
        self._found: Found | None = None
        self._reopened: set[str] = set()
        self._files: list[StagedFile] = []
        self._place: StagingPlace | None = None
        self._journal: Journal | None = None
        self._recorder: Recorder | None = None
        self._names_dirty = True
        self._new_fd = -1
        self._placed = self._keep = False

    @property
    def path(self) -> Path:
        """Where the output lies until it is committed: a file or folder with the destination's own name."""
        return self.destination if self.finished else self._staging.path / NEW / self.destination.name

    @property
    def completed(self) -> dict[str, Any]:
        """What earlier runs completed, by name, with its record; of pieces all of whose files have been asked for with ``file``."""
        pieces = {} if self._found is None else self._found.pieces
        return {
            name: piece.record
            for name, piece in pieces.items()
            if self.finished or self._reopened.issuperset(piece.files)
        }

    @property
    def _staging(self) -> StagingPlace:
        if self._place is None:
            raise ValueError("not inside the with block")
        return self._place

    def __enter__(self) -> Self:
        if not staging_place.exists(self.destination):
            self._check_destination()
        self._place = StagingPlace(self.destination)
        self._keep = True  # what is here stays as long as it is not known to be of no use
        try:
            self._place.recover()
            self._take_over()
            if not self.finished:
                self._check_space()
                self._prepare()
        except BaseException as error:
            self._roll_back(error)
            raise
        return self

    def _take_over(self) -> None:
        """Decides what becomes of what an earlier run left."""
        place = self._staging
        found = staging_journal.read(place.fd)
        state = State.USELESS
        if found is not None and self.fingerprint is not None and not self.restart:
            state = staging_resume.judge(found, place, self.fingerprint)
        self.finished = state is State.FINISHED
        if not self.finished:
            self._check_destination()
        if state is State.FOREIGN:
            raise staging_resume.refusal(found, self.fingerprint, self.destination)
        self._keep = False
        if state is State.USELESS:
            place.discard()
            return
        self._found = found
        if state is State.USEFUL and place.identity(OLD, place.fd):
            with translate_os_errors(place.path, "removing staged files"):
                remove_tree(OLD, place.fd)

    def _prepare(self) -> None:
        place = self._staging
        with translate_os_errors(place.path, "creating the staging folder"):
            if self._found is None:
                os.mkdir(NEW, 0o777, dir_fd=place.fd)
            self._new_fd = os.open(NEW, _FOLDER, dir_fd=place.fd)
            if self.folder and self._found is None:
                os.mkdir(self.destination.name, 0o777, dir_fd=self._new_fd)
        if self.fingerprint is not None:
            self._journal = Journal(place.fd, place.path, self.fingerprint, self._found)
            self._recorder = Recorder(self._journal, self._sync)

    def _check_destination(self) -> None:
        if self.destination.name in ("", ".."):
            raise UsageError(
                "output.name", f"{self.destination}: not a name for an output", hint="name a file or folder"
            )
        refuse_existing(self.destination, force=self.force, folder=self.folder)

    def _check_space(self) -> None:
        with translate_os_errors(self.destination.parent, "asking for the free space"):
            disk = os.statvfs(self._staging.parent_fd)
        free = disk.f_bavail * disk.f_frsize
        needed = self.expected_bytes - (0 if self._found is None else self._staging.allocated())
        if disk.f_blocks and needed > free:  # some network file systems report nothing at all
            raise ResourceError(
                "disk.full",
                f"{self.destination}: needs {needed} bytes, {free} are free on its disk",
                hint=f"free {needed - free} bytes more, or write to another disk",
            )

    def file(self, relative_name: str, size: int) -> StagedFile:
        """A staged file of ``size`` bytes; its mode follows the umask. It may hold what an earlier run completed (``completed``).

        ``relative_name`` is a path below a folder destination; for a file destination it is the destination's own name.
        """
        parts = PurePosixPath(relative_name).parts
        if not parts or ".." in parts or parts[0] == "/" or (not self.folder and parts != (self.destination.name,)):
            raise ValueError(f"{relative_name!r} is not a name inside {self.destination}")
        if self.folder:
            parts = (self.destination.name, *parts)
        path = self._staging.path.joinpath(NEW, *parts)
        with translate_os_errors(path, "creating the file", size):
            fd = self._reopen("/".join(parts), size)
            if fd >= 0:
                self._reopened.add(relative_name)
            else:
                fd = self._create(parts, size)
        staged = StagedFile(path, size, fd)
        self._files.append(staged)
        return staged

    def _reopen(self, name: str, size: int) -> int:
        """A file that an earlier run left; -1 where there is none of that size."""
        if self._found is None:
            return -1
        try:
            fd = os.open(name, _REOPEN, dir_fd=self._new_fd)
        except FileNotFoundError:
            return -1
        if os.fstat(fd).st_size == size:
            return fd
        os.close(fd)
        os.unlink(name, dir_fd=self._new_fd)
        return -1

    def _create(self, parts: Sequence[str], size: int) -> int:
        for depth in range(2, len(parts)):
            try:
                os.mkdir("/".join(parts[:depth]), 0o777, dir_fd=self._new_fd)
            except FileExistsError:
                pass
        fd = os.open("/".join(parts), _CREATE, 0o666, dir_fd=self._new_fd)
        self._names_dirty = True
        try:
            preallocate(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def write_bytes(self, relative_name: str, data: bytes) -> None:
        """A staged file that holds ``data``."""
        staged = self.file(relative_name, len(data))
        staged.pwrite(0, data)
        staged.close()

    def complete(self, name: str, files: Sequence[str], record: Any = None, nbytes: int = 0) -> None:
        """All of the piece ``name`` has been written, into ``files``; ``record`` (JSON) comes back in ``completed`` if the run is
        continued. From any thread; without a fingerprint nothing happens. Raises ResourceError if the disk has failed meanwhile."""
        if self._recorder is not None:
            self._recorder.complete(name, tuple(files), record, nbytes)

    def _sync(self) -> None:
        for staged in list(self._files):
            staged.sync()
        if self._names_dirty:
            self._names_dirty = False
            self._sync_folders()

    def commit(self) -> None:
        """Makes the staged output durable and puts it at the destination; the old one is removed after that.

        Raises ResourceError when the disk fails; the destination is then as it was.
        """
        commit([self])

    def make_durable(self) -> None:
        """The first part of ``commit``: what is staged survives a power failure."""
        if self.finished:
            return
        if self._recorder is not None:
            self._recorder.close()
        for staged in self._files:
            staged.close()
        self._sync_folders()

    def put_in_place(self) -> None:
        """The second part, an instant: the destination is the new output."""
        if self.finished:
            return
        place, name = self._staging, self.destination.name
        new = place.identity(name, self._new_fd)
        if new is None:
            raise ValueError(f"{self.destination}: nothing was staged")
        if self._journal is not None:
            self._journal.placing(new[1])
        try:
            self._check_destination()
            with translate_os_errors(self.destination, "moving the finished output into place"):
                if place.identity(name, place.parent_fd) is None:
                    retrying(os.rename, name, name, src_dir_fd=self._new_fd, dst_dir_fd=place.parent_fd)
                elif not syscalls.exchange(name, self._new_fd, name, place.parent_fd):
                    retrying(os.rename, name, OLD, src_dir_fd=place.parent_fd, dst_dir_fd=place.fd)
                    retrying(os.rename, name, name, src_dir_fd=self._new_fd, dst_dir_fd=place.parent_fd)
                sync_folder(place.parent_fd)
            self._placed = True
        except BaseException as error:
            self._put_back(new, error)
            raise

    def set_aside(self, neighbour: Path) -> None:
        """Takes a file beside the destination away because it goes with what that held: into the staging place, to go with it.

        Raises ResourceError when the disk fails; the file is then where it was.
        """
        place = self._staging
        with translate_os_errors(neighbour, "taking it away"):
            retrying(os.rename, neighbour.name, ASIDE, src_dir_fd=place.parent_fd, dst_dir_fd=place.fd)
            sync_folder(place.parent_fd)

    def bring_back(self, neighbour: Path) -> None:
        """Undoes ``set_aside``, if something was; never over what lies there by now. Raises ResourceError when the disk fails."""
        place = self._staging
        with translate_os_errors(neighbour, "putting it back"):
            if place.identity(ASIDE, place.fd) and not place.identity(neighbour.name, place.parent_fd):
                retrying(os.rename, ASIDE, neighbour.name, src_dir_fd=place.fd, dst_dir_fd=place.parent_fd)

    def clear(self) -> None:
        """The third part: removes what was staged and the old output, as far as it is possible. The journal still says that the output
        is in place, so that of several outputs none looks foreign to a repeated run while others are tidied up."""
        with suppress(
            Exception
        ):  # the output is in place: what cannot be tidied up is left for `clean`, and is no failure
            self._close()
            self._staging.discard(keep_journal=True)

    def finish(self) -> None:
        """The last part: removes the staging place and frees the lock, as far as it is possible."""
        for step in (self._close, self._staging.remove, self._staging.close):
            with suppress(Exception):
                step()
        self._place = None

    def _sync_folders(self) -> None:
        with translate_os_errors(self._staging.path, "making the folder durable"):
            if self.folder:
                for _, _, _, fd in os.fwalk(self.destination.name, dir_fd=self._new_fd, follow_symlinks=False):
                    sync_folder(fd)
            sync_folder(self._new_fd)

    def _put_back(self, new: tuple[int, int], cause: BaseException) -> None:
        """Undoes as much of ``put_in_place`` as was done, judging by what lies where."""
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

    def _roll_back(self, error: BaseException | None) -> None:
        if self._recorder is not None:
            self._recorder.abandon()
        if self._placed and error is not None:
            error.add_note(f"{self.destination}: is in place, complete")
        elif self._has_progress and error is not None and _may_be_repeated(error):
            self._keep = True
            if not self.finished:
                error.add_note(
                    f"{self.destination}: what is complete is kept beside it; the same command continues, "
                    f"'gemma2tool clean {self.destination}' removes it"
                )
        for staged in self._files:
            staged.abandon()
        self._close()
        if self._place is not None:
            if self._keep:
                self._place.remove_if_empty()
            else:
                self._place.remove()
            self._place.close()
            self._place = None

    @property
    def _has_progress(self) -> bool:
        return self._found is not None or (self._recorder is not None and self._recorder.recorded > 0)

    def _close(self) -> None:
        self._files.clear()
        if self._journal is not None:
            self._journal.close()
        fd, self._new_fd = self._new_fd, -1
        if fd >= 0:
            os.close(fd)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._place is not None:
            self._roll_back(error)


def _may_be_repeated(error: BaseException) -> bool:
    """Whether the same work may well succeed later: it was interrupted, or the machine or the circumstances did not let it finish."""
    return not isinstance(error, Exception) or isinstance(error, (ResourceError, UsageError, MemoryError))


def commit(stagings: Sequence[Staging]) -> None:
    """Puts several staged outputs in place, one right after the other: all are durable before the first replaces anything."""
    for staging in stagings:
        staging.make_durable()
    for staging in stagings:
        staging.put_in_place()
    for staging in stagings:
        staging.clear()
    for staging in stagings:
        staging.finish()
