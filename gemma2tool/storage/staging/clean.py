"""Removing what interrupted runs left."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gemma2tool.errors import ResourceError, ToolError, UsageError
from gemma2tool.storage.staging import lock as staging_lock
from gemma2tool.storage.staging.lock import LOCK
from gemma2tool.storage.staging.place import PREFIX, SUFFIX, StagingPlace, folder_name
from gemma2tool.storage.syscalls import translate_os_errors


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a run that did not finish left: its staging place and the destination it was for.

    ``nbytes``: what it takes on the disk. ``in_use``: a process is working there, so it was left alone. ``restored``: the old
    destination was put back. ``removed``: it is gone. ``problem``: why it was left alone: it is in use, it is not ours, or the disk
    failed.
    """

    path: Path
    destination: Path
    nbytes: int
    in_use: bool
    restored: bool
    removed: bool
    problem: ToolError | None = None


def clean(path: str | os.PathLike[str], *, dry_run: bool = False) -> list[Leftover]:
    """Removes what interrupted runs staged beside the destination ``path`` and, when it is a folder, directly inside it.

    Nothing but staging places of this user is touched, and none that is in use. ``dry_run`` only lists them, and writes nothing.
    What keeps one from being removed is told with it (``problem``); the others are cleaned. Raises UsageError for a path that can be
    no destination, ResourceError for a folder that cannot be read.
    """
    path = Path(path)
    if Path(os.path.abspath(path)).name == "":
        raise UsageError(
            "clean.path", f"{path}: cannot be an output", hint="name the output, or the folder that it is in"
        )
    destinations = [path] if path.name not in ("", "..") else []
    with translate_os_errors(path, "looking for it"):
        is_folder = path.is_dir()
        names = sorted(os.listdir(path)) if is_folder else []
    if is_folder:
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
        return place[len(PREFIX) : -len(SUFFIX)]
    try:
        _, said = staging_lock.read(fd) or ("", "")
    finally:
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
    except ToolError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # its owner has just finished
            return None
        in_use = error.id == "output.locked"
        if in_use:
            error = ResourceError(error.id, f"{error.message}, so {staged} was left alone", hint=error.hint)
        return Leftover(staged, destination, nbytes, in_use=in_use, restored=False, removed=False, problem=error)
    restored, problem = False, None
    try:
        if not dry_run:
            restored = place.recover()
            place.remove()
    except ToolError as error:
        problem = error
    finally:
        place.close()
    removed = not os.path.lexists(staged)
    return Leftover(staged, destination, nbytes, in_use=False, restored=restored, removed=removed, problem=problem)


def _size(staged: Path) -> int:
    """Bytes that what is staged takes on the disk."""
    total = 0
    with suppress(RecursionError):  # as deep as it can be looked into
        for folder, _, names in os.walk(staged):
            for name in set(names) - {LOCK}:
                with suppress(OSError):  # its owner has just removed it
                    total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total
