"""What makes a folder a staging place of ours, so that nothing of anybody else's is ever taken for one.

Its name alone decides nothing: a place is ours when its ``lock`` says so and it holds nothing that a run would not have put there.
A kill right after the folder or its lock was made leaves an empty folder, or one with an empty lock; those are ours too, for there
is nothing in them to lose.
"""

from __future__ import annotations

import os
import re
import stat

LOCK, NEW, OLD, ASIDE, JOURNAL = "lock", "new", "old", "aside", "journal"
ENTRIES = frozenset((LOCK, NEW, OLD, ASIDE, JOURNAL))
OPEN_LOCK = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Writable, for some network file systems lock nothing else; a pipe or device in its place does not make us wait."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_BYTES = 4096
_CONTENT = re.compile(rb"gemma2tool staging 1\n([0-9]+) *\n(.+)", re.DOTALL)


def content(name: str) -> bytes:
    """What the lock of the place for ``name`` holds while this process works there. Of one length for all processes: written over
    in one call it is never half of one and half of another."""
    return b"gemma2tool staging 1\n%-10d\n%s" % (os.getpid(), os.fsencode(name))


def is_sound(status: os.stat_result) -> bool:
    """Whether a lock is a file of one name: a link to somebody's file would have it written over."""
    return stat.S_ISREG(status.st_mode) and status.st_nlink <= 1


def read(fd: int) -> tuple[str, str] | None:
    """(process id, destination's name) as an open lock says; None where it is none of ours. Empty strings: nothing was written yet."""
    status = os.fstat(fd)
    if not is_sound(status) or status.st_size > _MAX_BYTES:
        return None
    data = os.pread(fd, _MAX_BYTES, 0)
    if not data:
        return "", ""
    match = _CONTENT.fullmatch(data)
    return None if match is None else (match[1].decode(), os.fsdecode(match[2]))


def stray(fd: int, lock_fd: int, name: str) -> str | None:
    """What in the open folder ``fd`` is not of a staging place for ``name``: its path inside; None where all of it is.

    ``lock_fd``: its open lock, held by us.
    """
    said = read(lock_fd)
    if said is None or said[1] not in ("", name):
        return LOCK
    known = ENTRIES if said[1] else {LOCK}
    for each in sorted(os.listdir(fd)):
        if each not in known:
            return each
        inside = _stray_inside(each, fd, name)
        if inside is not None:
            return inside
    return None


def _stray_inside(entry: str, fd: int, name: str) -> str | None:
    """Of the entries only ``new`` and ``journal`` say what may be in them: one output, and nothing. Links are never followed."""
    if entry not in (NEW, JOURNAL):
        return None
    mode = os.stat(entry, dir_fd=fd, follow_symlinks=False).st_mode
    if not stat.S_ISDIR(mode):
        return NEW if entry == NEW and stat.S_ISREG(mode) else None
    inner = os.open(entry, _FOLDER, dir_fd=fd)
    try:
        for each in sorted(os.listdir(inner)):
            if entry == JOURNAL or each != name:
                return f"{entry}/{each}"
    finally:
        os.close(inner)
    return None
