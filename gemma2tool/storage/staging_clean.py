"""Removing what interrupted runs left."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from gemma2tool.errors import ResourceError
from gemma2tool.storage.staging_place import LOCK, PREFIX, SUFFIX, StagingPlace, folder_name


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a run that did not finish left: its staging place and the destination it was for.

    ``nbytes``: what it takes on the disk. ``in_use``: a process is working there, so it was left alone. ``restored``: the old
    destination was put back. ``removed``: it is gone.
    """

    path: Path
    destination: Path
    nbytes: int
    in_use: bool
    restored: bool
    removed: bool


def clean(path: str | os.PathLike[str], *, dry_run: bool = False) -> list[Leftover]:
    """Removes what interrupted runs staged beside the destination ``path`` and, when it is a folder, directly inside it.

    Nothing but staging places of this user is touched, and none that is in use. ``dry_run`` only lists them.
    """
    path = Path(path)
    destinations = [path] if path.name not in ("", "..") else []
    if path.is_dir():
        names = sorted(os.listdir(path))
        destinations += [
            path / _destination_name(path, name)
            for name in names
            if name.startswith(PREFIX) and name.endswith(SUFFIX) and len(name) > len(PREFIX + SUFFIX)
        ]
    found = []
    for destination in destinations:
        leftover = _clean_one(destination, dry_run)
        if leftover:
            found.append(leftover)
    return found


def _destination_name(folder: Path, place: str) -> str:
    """Of which destination a staging place is: as its lock says where that can be right, else as its own name does."""
    try:
        fd = os.open(folder / place / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        said = ""
    else:
        said = os.fsdecode(os.pread(fd, 4096, 0).partition(b"\n")[2])
        os.close(fd)
    if said not in ("", ".", "..") and "/" not in said and "\0" not in said and folder_name(said) == place:
        return said
    return place[len(PREFIX) : -len(SUFFIX)]


def _clean_one(destination: Path, dry_run: bool) -> Leftover | None:
    staged = destination.with_name(folder_name(destination.name))
    try:
        status = os.lstat(staged)
    except OSError:
        return None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return None
    nbytes = _size(staged)
    try:
        place = StagingPlace(destination, create=False)
    except ResourceError as error:
        if error.id == "output.locked":
            return Leftover(staged, destination, nbytes, in_use=True, restored=False, removed=False)
        if isinstance(error.__cause__, FileNotFoundError):  # its owner has just finished
            return None
        raise
    try:
        restored = False
        if not dry_run:
            restored = place.recover()
            place.remove()
        return Leftover(staged, destination, nbytes, in_use=False, restored=restored, removed=not os.path.lexists(staged))
    finally:
        place.close()


def _size(staged: Path) -> int:
    """Bytes that what is staged takes on the disk."""
    total = 0
    for folder, _, names in os.walk(staged):
        for name in set(names) - {LOCK}:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except OSError:  # its owner has just removed it
                continue
    return total
