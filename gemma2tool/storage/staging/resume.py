"""Deciding what to do with the output that an earlier run staged: finish it, continue it, protect it or discard it."""

from __future__ import annotations

import enum
import os
import shlex
import stat
from collections.abc import Collection
from pathlib import Path

from gemma2tool.errors import ResourceError, UsageError
from gemma2tool.storage.staging import journal
from gemma2tool.storage.staging import place as staging_place
from gemma2tool.storage.staging.journal import EarlierRun, Fingerprint
from gemma2tool.storage.staging.kept import KeptFiles
from gemma2tool.storage.staging.lock import NEW
from gemma2tool.storage.staging.place import StagingPlace

_SHOWN_DIFFERENCES = 3
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class LeftoverState(enum.Enum):
    """``FINISHED``: the output is at its destination, only the clean-up is missing.

    ``USEFUL``: the same work, with complete pieces or kept files. ``FOREIGN``: other work with such. ``USELESS``:
    anything else.
    """

    FINISHED = enum.auto()
    USEFUL = enum.auto()
    FOREIGN = enum.auto()
    USELESS = enum.auto()


def check_leftovers(
    destination: Path, fingerprint: Fingerprint, *, unknown: Collection[str] = (), restart: bool = False
) -> None:
    """Raises what staging ``destination`` would raise for what an earlier run left, before any work; changes nothing.
    ``unknown``: names of the fingerprint that are not known yet. ``restart``: as of ``Staging``.

    Raises ``UsageError`` (``resume.mismatch``) for other work, ``ResourceError`` for a process that works there.
    """
    if not staging_place.exists(destination):
        return
    try:
        place = StagingPlace(destination, create=False)
    except ResourceError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # its owner has just finished
            return
        raise
    try:
        earlier = journal.read(place.fd)
        if earlier is None or restart:
            return
        known = {name: value for name, value in fingerprint.items() if name not in unknown}
        known |= {name: earlier.fingerprint[name] for name in unknown if name in earlier.fingerprint}
        if classify_leftovers(earlier, place, known) is LeftoverState.FOREIGN:
            raise refusal(earlier, known, destination)
    finally:
        place.close()


def classify_leftovers(run: EarlierRun, place: StagingPlace, fingerprint: Fingerprint) -> LeftoverState:
    """The state of a staging place that ``run`` left, for work with this fingerprint."""
    same = not run.differences(fingerprint)
    destination = place.identity(place.name, place.parent_fd)
    if run.placed_inode is not None and destination is not None and destination[1] == run.placed_inode:
        return LeftoverState.FINISHED if same else LeftoverState.USELESS
    has_progress = run.pieces or KeptFiles(place.fd, place.path).names()
    if not has_progress or not _is_sound(run, place):
        return LeftoverState.USELESS
    return LeftoverState.USEFUL if same else LeftoverState.FOREIGN


def _is_sound(run: EarlierRun, place: StagingPlace) -> bool:
    """Whether the staged files are those of the journal: not the old output that was swapped for them, and no links."""
    try:
        new_fd = os.open(NEW, _FOLDER, dir_fd=place.fd)
    except OSError:
        return False
    try:
        output = place.identity(place.name, new_fd)
        if output is None or (run.placed_inode is not None and output[1] != run.placed_inode):
            return False
        for _, folders, files, fd in os.fwalk(dir_fd=new_fd, follow_symlinks=False):
            for name in (*folders, *files):
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if not stat.S_ISDIR(status.st_mode) and not (stat.S_ISREG(status.st_mode) and status.st_nlink == 1):
                    return False
    finally:
        os.close(new_fd)
    return True


def refusal(run: EarlierRun, fingerprint: Fingerprint, destination: Path) -> UsageError:
    """The error that says why ``run`` cannot be continued and what to do."""
    differences = run.differences(fingerprint)
    more = len(differences) - _SHOWN_DIFFERENCES
    phrases = "; ".join(differences[:_SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
    return UsageError(
        "resume.mismatch",
        f"{destination}: an unfinished run beside it does not match this one: {phrases}",
        hint="repeat the earlier command, or start over with --restart, or remove what it left: "
        f"gemma2tool clean {shlex.quote(str(destination))}",
    )
