"""Removing what interrupted runs left behind."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from gemma2tool.errors import ResourceError, ToolError, UsageError
from gemma2tool.storage.staging import lock as staging_lock
from gemma2tool.storage.staging.lock import LOCK
from gemma2tool.storage.staging.place import PREFIX, SUFFIX, StagingPlace, allocated_bytes, folder_name
from gemma2tool.storage.syscalls import translate_os_errors


@dataclass(frozen=True, slots=True)
class Leftover:
    """What an unfinished run left: its staging folder, and the destination it was for.

    - ``nbytes``: the space it takes on the disk.
    - ``in_use``: another process is working in it, so it was left alone.
    - ``restored``: the old destination was put back.
    - ``removed``: the staging folder no longer exists.
    - ``problem``: why it was not removed: it is in use, it contains files that gemma2tool did not write, or the disk
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
    """Removes what interrupted runs staged beside the destination ``path`` and, if it is a folder, directly inside it.

    Only staging places that belong to this user and are not in use are removed. With ``dry_run`` they are only listed.
    If one cannot be removed, its ``problem`` says why, and the others are still cleaned.

    Raises UsageError for a path that cannot be a destination, ResourceError for a folder that cannot be read.
    """
    path = Path(path)
    if Path(os.path.abspath(path)).name == "":
        raise UsageError(
            "clean.path", f"{path}: cannot be an output", hint="name the output, or the folder that contains it"
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
    leftovers = (_clean_one(destination, dry_run) for destination in destinations)
    return [leftover for leftover in leftovers if leftover is not None]


def _destination_name(folder: Path, place: str) -> str:
    """The destination name of a staging place: from its lock if that is plausible, else from its own name."""
    from_place = place[len(PREFIX) : -len(SUFFIX)]
    try:
        fd = os.open(folder / place / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return from_place
    try:
        _, from_lock = staging_lock.read(fd) or ("", "")
    finally:
        os.close(fd)
    is_plain = from_lock not in ("", ".", "..") and "/" not in from_lock and "\0" not in from_lock
    return from_lock if is_plain and folder_name(from_lock) == place else from_place


def _clean_one(destination: Path, dry_run: bool) -> Leftover | None:
    staged = destination.with_name(folder_name(destination.name))
    try:
        status = os.lstat(staged)
    except OSError:
        return None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return None
    nbytes = allocated_bytes(staged)
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
