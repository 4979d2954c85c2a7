"""Recognizing a staging place of gemma2tool, so that a folder with other people's files is never taken for one.

The folder's name is not enough: a folder is a staging place if its ``lock`` says so and it contains nothing that
gemma2tool would not have put there. A run killed right after it made the folder or the lock leaves an empty folder or
an empty lock. Those are accepted too, because there is nothing in them to lose.
"""

from __future__ import annotations

import os
import re
import stat

LOCK, NEW, OLD, ASIDE, JOURNAL, KEPT = "lock", "new", "old", "aside", "journal", "kept"
ENTRIES = frozenset((LOCK, NEW, OLD, ASIDE, JOURNAL, KEPT))
OPEN_LOCK = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Writable, because some network file systems can lock nothing else.

Does not wait if it turns out to be a pipe or a device.
"""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_KEPT_NAME = re.compile(r"partial|[a-z]+-[0-9]{4}")
_MAX_BYTES = 4096
_CONTENT = re.compile(rb"gemma2tool staging 1\n([0-9]+) *\n(.+)", re.DOTALL)


def content(name: str) -> bytes:
    """The content of the lock of the staging place for ``name`` while this process works there.

    It has the same length for every process, so overwriting it in one call never leaves a mixture of two.
    """
    return b"gemma2tool staging 1\n%-10d\n%s" % (os.getpid(), os.fsencode(name))


def is_sound(status: os.stat_result) -> bool:
    """Whether a lock is a regular file with a single name. Writing to a second name would overwrite somebody's file."""
    return stat.S_ISREG(status.st_mode) and status.st_nlink <= 1


def read(fd: int) -> tuple[str, str] | None:
    """Reads (process id, destination name) from an open lock.

    Returns two empty strings if nothing was written yet, None if it is not a lock of gemma2tool.
    """
    status = os.fstat(fd)
    if not is_sound(status) or status.st_size > _MAX_BYTES:
        return None
    data = os.pread(fd, _MAX_BYTES, 0)
    if not data:
        return "", ""
    match = _CONTENT.fullmatch(data)
    return None if match is None else (match[1].decode(), os.fsdecode(match[2]))


def foreign_entry(fd: int, lock_fd: int, name: str) -> str | None:
    """The relative path of something in the open folder ``fd`` that does not belong in a staging place for ``name``, or
    None.

    ``lock_fd`` is its open lock, held by this process.
    """
    owner = read(lock_fd)
    if owner is None or owner[1] not in ("", name):
        return LOCK
    known = ENTRIES if owner[1] else {LOCK}
    for entry in sorted(os.listdir(fd)):
        if entry not in known:
            return entry
        inside = _foreign_inside(entry, fd, name)
        if inside is not None:
            return inside
    return None


def _foreign_inside(entry: str, fd: int, name: str) -> str | None:
    """Checks ``new``, which may contain only the output, ``kept``, which may contain only files with names like its
    own, and ``journal``, which may not be a folder with files.

    Links are not followed.
    """
    if entry not in (NEW, JOURNAL, KEPT):
        return None
    mode = os.stat(entry, dir_fd=fd, follow_symlinks=False).st_mode
    if not stat.S_ISDIR(mode):
        return entry if entry != JOURNAL and stat.S_ISREG(mode) else None
    folder_fd = os.open(entry, _FOLDER, dir_fd=fd)
    try:
        for inner in sorted(os.listdir(folder_fd)):
            is_known = {NEW: inner == name, KEPT: _KEPT_NAME.fullmatch(inner) is not None, JOURNAL: False}
            if not is_known[entry]:
                return f"{entry}/{inner}"
    finally:
        os.close(folder_fd)
    return None
