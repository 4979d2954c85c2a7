"""Writes an output so that its name always holds either the complete new output or what it held before.

The output is written beside its destination: preallocated, written at offsets, fsynced, then renamed. The order is:
write, fsync the files, fsync their folders, rename, fsync the parent. Any failure before the rename leaves the
destination as it was. With a fingerprint the staged output survives a kill, and the next run with the same fingerprint
continues it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from gemma2tool.errors import ResourceError, ToolError, UsageError
from gemma2tool.storage.paths import refuse_existing
from gemma2tool.storage.staging import journal as staging_journal
from gemma2tool.storage.staging import place as staging_place
from gemma2tool.storage.staging import placement, staged_file
from gemma2tool.storage.staging import resume as staging_resume
from gemma2tool.storage.staging.journal import EarlierRun, Fingerprint, Journal
from gemma2tool.storage.staging.kept import KeptFiles
from gemma2tool.storage.staging.lock import NEW, OLD
from gemma2tool.storage.staging.place import StagingPlace, allocated_bytes, remove_tree
from gemma2tool.storage.staging.recorder import Recorder
from gemma2tool.storage.staging.resume import LeftoverState
from gemma2tool.storage.staging.staged_file import StagedFile
from gemma2tool.storage.syscalls import free_bytes, sync_folder, translate_os_errors
from gemma2tool.storage.units import human_bytes

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Staging:
    """The staged replacement of ``destination``, a file or (with ``folder``) a folder. Use it in a ``with`` block.

    Inside the block, create files with ``file`` and ``write_bytes``, check the output at ``path``, and call ``commit``.
    Leaving the block without ``commit``, by any exception, removes what was staged and leaves the destination as it
    was. ``expected_bytes`` must fit on the disk before the first byte is written.

    With a ``fingerprint`` (what must be the same for the bytes to be the same) the work can be continued. Pieces
    reported with ``complete`` are journaled once they are durable. They are kept if the process is killed or
    interrupted, or the machine cannot finish the work (ResourceError, UsageError, MemoryError). The next ``Staging``
    with the same fingerprint lists them in ``completed``. One with another fingerprint is refused, unless ``restart``
    is set. ``finished`` means that an earlier run was killed after its output was in place, so only ``commit`` remains.

    Raises UsageError if the destination exists and ``force`` is not set, or if work of another fingerprint is staged;
    ResourceError for a lock, a full disk or a folder that may not be written. What comes to the destination inside the
    block, or is changed there, is not replaced, even with ``force``.
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
        self._earlier: EarlierRun | None = None
        self._reopened: set[str] = set()
        self._files: list[StagedFile] = []
        self._place: StagingPlace | None = None
        self._journal: Journal | None = None
        self._recorder: Recorder | None = None
        self._names_dirty = True
        self._new_fd = -1
        self._present: tuple[object, ...] | None = None
        self._placed = self._keep = False

    @property
    def path(self) -> Path:
        """Where the output is until it is committed: a file or folder with the destination's own name."""
        return self.destination if self.finished else self._staging.path / NEW / self.destination.name

    @property
    def completed(self) -> dict[str, Any]:
        """The pieces that earlier runs completed: name -> record.

        Lists a piece once ``file`` was called for all of its files.
        """
        pieces = {} if self._earlier is None else self._earlier.pieces
        return {
            name: piece.record
            for name, piece in pieces.items()
            if self.finished or self._reopened.issuperset(piece.files)
        }

    @property
    def kept(self) -> KeptFiles:
        """Intermediate results that the work needs to continue, this run's or an earlier one's."""
        return KeptFiles(self._staging.fd, self._staging.path)

    def is_recorded(self, name: str) -> bool:
        """Whether the piece ``name`` would survive a kill now."""
        return name in self.completed or (self._recorder is not None and name in self._recorder.recorded)

    @property
    def _staging(self) -> StagingPlace:
        if self._place is None:
            raise ValueError("not inside the with block")
        return self._place

    # -- opening -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if not staging_place.exists(self.destination):
            self._check_destination()
        self._place = StagingPlace(self.destination)
        self._keep = True  # until it is known to be useless
        try:
            self._place.recover()
            self._take_over()
            self._present = self._place.content_stamp(self.destination.name, self._place.parent_fd)
            if not self.finished:
                self._check_space()
                self._prepare()
        except BaseException as error:
            self._roll_back(error)
            raise
        return self

    def _take_over(self) -> None:
        """Continues, discards or refuses what an earlier run left."""
        place = self._staging
        earlier = staging_journal.read(place.fd)
        state = LeftoverState.USELESS
        if earlier is not None and self.fingerprint is not None and not self.restart:
            state = staging_resume.classify_leftovers(earlier, place, self.fingerprint)
            self.finished = state is LeftoverState.FINISHED
            if state is LeftoverState.FOREIGN:
                self._check_destination()
                raise staging_resume.refusal(earlier, self.fingerprint, self.destination)
        if not self.finished:
            self._check_destination()
        self._keep = False
        if state is LeftoverState.USELESS:
            place.discard()
            return
        self._earlier = earlier
        if state is LeftoverState.USEFUL and place.identity(OLD, place.fd):
            with translate_os_errors(place.path, "removing staged files"):
                remove_tree(OLD, place.fd)

    def _prepare(self) -> None:
        place = self._staging
        with translate_os_errors(place.path, "creating the staging folder"):
            if self._earlier is None:
                os.mkdir(NEW, 0o777, dir_fd=place.fd)
            self._new_fd = os.open(NEW, _FOLDER, dir_fd=place.fd)
            if self.folder and self._earlier is None:
                os.mkdir(self.destination.name, 0o777, dir_fd=self._new_fd)
        if self.fingerprint is not None:
            self._journal = Journal(place.fd, place.path, self.fingerprint, self._earlier)
            self._recorder = Recorder(self._journal, self._sync)

    def _check_destination(self) -> None:
        if self.destination.name in ("", ".."):
            raise UsageError(
                "output.name", f"{self.destination}: not a name for an output", hint="name a file or folder"
            )
        refuse_existing(self.destination, force=self.force, folder=self.folder)

    def _refuse_newcomer(self) -> None:
        """``force`` is for what was at the destination when the work began."""
        now = self._staging.content_stamp(self.destination.name, self._staging.parent_fd)
        if now is not None and now != self._present:
            raise UsageError("output.appeared", f"{self.destination}: was created, replaced or changed during the run")

    def _check_space(self) -> None:
        with translate_os_errors(self.destination.parent, "asking for the free space"):
            free = free_bytes(self._staging.parent_fd)
        needed = self.expected_bytes - (0 if self._earlier is None else self._staging.allocated())
        if free is not None and needed > free:
            raise ResourceError(
                "disk.full",
                f"{self.destination}: needs {needed} bytes, {free} are free on its disk",
                hint=f"free another {needed - free} bytes, or write to another disk",
            )

    # -- writing -------------------------------------------------------------------------------------------------------

    def file(self, relative_name: str, size: int) -> StagedFile:
        """Returns a staged file of ``size`` bytes whose mode follows the umask.

        It may hold what an earlier run completed.

        ``relative_name`` is a path below a folder destination. For a file destination it is the destination's own name.
        """
        parts = PurePosixPath(relative_name).parts
        if not parts or ".." in parts or parts[0] == "/" or (not self.folder and parts != (self.destination.name,)):
            raise ValueError(f"{relative_name!r} is not a name inside {self.destination}")
        if self.folder:
            parts = (self.destination.name, *parts)
        path = self._staging.path.joinpath(NEW, *parts)
        with translate_os_errors(path, "creating the file", size):
            fd = None if self._earlier is None else staged_file.reopen(parts, size, self._new_fd)
            if fd is not None:
                self._reopened.add(relative_name)
            else:
                fd = staged_file.create(parts, size, self._new_fd)
                self._names_dirty = True
        file = StagedFile(path, size, fd)
        self._files.append(file)
        return file

    def write_bytes(self, relative_name: str, data: bytes) -> None:
        """Writes a staged file that contains ``data``."""
        file = self.file(relative_name, len(data))
        file.pwrite(0, data)
        file.close()

    def complete(self, name: str, files: Sequence[str], record: Any = None, nbytes: int = 0) -> None:
        """Reports that the piece ``name`` has been written to ``files``. Any thread may call it.

        ``record`` (JSON) is returned by ``completed`` if the run is continued. Does nothing without a fingerprint.
        Raises ResourceError if the disk has failed meanwhile.
        """
        if self._recorder is not None:
            self._recorder.complete(name, tuple(files), record, nbytes)

    def _sync(self) -> None:
        for file in list(self._files):
            file.sync()
        if self._names_dirty:
            self._names_dirty = False
            self._sync_folders()

    def _sync_folders(self) -> None:
        with translate_os_errors(self._staging.path, "making the folder durable"):
            if self.folder:
                for _, _, _, fd in os.fwalk(self.destination.name, dir_fd=self._new_fd, follow_symlinks=False):
                    sync_folder(fd)
            sync_folder(self._new_fd)

    # -- committing ----------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Makes the staged output durable, moves it to the destination and then removes the old output.

        Raises ResourceError if the disk fails. The destination is then as it was.
        """
        commit([self])

    def make_durable(self) -> None:
        """First step of ``commit``: what is staged survives a power failure."""
        if self.finished:
            return
        if self._recorder is not None:
            self._recorder.close()
        for file in self._files:
            file.close()
        self._sync_folders()

    def put_in_place(self) -> None:
        """Second step: moves the new output to the destination.

        Raises UsageError if something came to the destination since the block was entered.
        """
        if self.finished:
            return
        new = self._staging.identity(self.destination.name, self._new_fd)
        if new is None:
            raise ValueError(f"{self.destination}: nothing was staged")
        self._refuse_newcomer()
        self._check_destination()
        if self._journal is not None:
            self._journal.placing(new[1])
        try:
            placement.put_in_place(self._staging, self._new_fd)
            self._placed = True
        except BaseException as error:
            self._put_back(new, error)
            raise

    def set_aside(self, neighbor: Path) -> None:
        """Moves a file beside the destination that belongs to its old content into the staging place, to be removed
        with it.

        Raises ResourceError if the disk fails. The file is then where it was.
        """
        placement.set_aside(self._staging, neighbor)

    def bring_back(self, neighbor: Path) -> None:
        """Undoes ``set_aside``, but never replaces another file. Raises ResourceError if the disk fails."""
        placement.bring_back(self._staging, neighbor)

    def clear(self) -> None:
        """Third step: removes what was staged and the old output, as far as possible.

        The journal is kept. It says that the output is in place, so if one of several outputs is still being cleaned up
        when the run is killed, a repeated run recognizes the others.
        """
        with suppress(Exception):  # the output is in place; what cannot be removed is left for `clean`
            self._close()
            self._staging.discard(keep_journal=True)

    def finish(self) -> None:
        """Last step: removes the staging place and releases the lock, as far as possible."""
        for step in (self._close, self._staging.remove, self._staging.close):
            with suppress(Exception):
                step()
        self._place = None

    def _put_back(self, new: tuple[int, int], cause: BaseException) -> None:
        try:
            placement.put_back(self._staging, self._new_fd, new)
        except (OSError, ToolError):
            # The staging place may contain the only copy of the old output. The next run or `clean` decides.
            self._keep = True
            cause.add_note(f"the old output may be inside {self._staging.path}")

    # -- leaving -------------------------------------------------------------------------------------------------------

    def _roll_back(self, error: BaseException | None) -> None:
        if self._recorder is not None:
            self._recorder.abandon()
        if self._placed and error is not None:
            error.add_note(f"{self.destination}: is in place, complete")
        elif self._has_progress and error is not None and _may_succeed_later(error):
            self._keep = True
            if not self.finished:
                nbytes = human_bytes(allocated_bytes(self._staging.path))
                error.add_note(
                    f"{self.destination}: what is complete is kept beside it ({nbytes}): the same command continues, "
                    f"'gemma2tool clean {shlex.quote(str(self.destination))}' removes it"
                )
        for file in self._files:
            file.abandon()
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
        recorded = self._recorder is not None and bool(self._recorder.recorded)
        return self._earlier is not None or recorded or (self._place is not None and bool(self.kept.names()))

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


def _may_succeed_later(error: BaseException) -> bool:
    """Whether the same work may succeed later: it was interrupted, or the machine or the circumstances prevented it."""
    return not isinstance(error, Exception) or isinstance(error, (ResourceError, UsageError, MemoryError))


def commit(stagings: Sequence[Staging]) -> None:
    """Commits several staged outputs. All are durable before the first replaces anything."""
    for staging in stagings:
        staging.make_durable()
    for staging in stagings:
        staging.put_in_place()
    for staging in stagings:
        staging.clear()
    for staging in stagings:
        staging.finish()
