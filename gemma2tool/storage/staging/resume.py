"""What becomes of what an earlier run staged: it is finished, continued, kept from being overwritten, or of no use."""

from __future__ import annotations

import enum
import os
import stat
from pathlib import Path

from gemma2tool.errors import UsageError
from gemma2tool.storage.staging.journal import Fingerprint, Found
from gemma2tool.storage.staging.place import NEW, StagingPlace

_SHOWN_DIFFERENCES = 3
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class State(enum.Enum):
    """``FINISHED``: the output is in place, only the tidying up is left. ``USEFUL``: pieces of this very work are complete.
    ``FOREIGN``: pieces of other work are. ``USELESS``: anything else."""

    FINISHED = enum.auto()
    USEFUL = enum.auto()
    FOREIGN = enum.auto()
    USELESS = enum.auto()


def judge(found: Found, place: StagingPlace, fingerprint: Fingerprint) -> State:
    """The state of the staging place whose journal says ``found``, for work of this fingerprint."""
    same = not found.differences(fingerprint)
    here = place.identity(place.name, place.parent_fd)
    if found.placed is not None and here is not None and here[1] == found.placed:
        return State.FINISHED if same else State.USELESS
    if not found.pieces or not _is_sound(found, place):
        return State.USELESS
    return State.USEFUL if same else State.FOREIGN


def _is_sound(found: Found, place: StagingPlace) -> bool:
    """Whether the staged files are still those of the journal: not the old output that was swapped for them, and no links."""
    try:
        new = os.open(NEW, _FOLDER, dir_fd=place.fd)
    except OSError:
        return False
    try:
        output = place.identity(place.name, new)
        if output is None or (found.placed is not None and output[1] != found.placed):
            return False
        for _, folders, files, fd in os.fwalk(dir_fd=new, follow_symlinks=False):
            for name in (*folders, *files):
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if not stat.S_ISDIR(status.st_mode) and not (stat.S_ISREG(status.st_mode) and status.st_nlink == 1):
                    return False
    finally:
        os.close(new)
    return True


def refusal(found: Found, fingerprint: Fingerprint, destination: Path) -> UsageError:
    """Why ``found`` cannot be continued, and what to do."""
    differences = found.differences(fingerprint)
    more = len(differences) - _SHOWN_DIFFERENCES
    said = "; ".join(differences[:_SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
    return UsageError(
        "resume.mismatch",
        f"{destination}: an unfinished run lies beside it that this one cannot continue: {said}",
        hint=f"repeat that run as it was, begin anew with --restart, or remove it with 'gemma2tool clean {destination}'",
    )
