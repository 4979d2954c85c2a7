"""What a staged output already holds, written down so that a run that was killed can be continued.

The journal lies beside the lock. Its first line is the *fingerprint* of the work: what must be the same for its bytes to be of use.
Each line after it names pieces whose bytes were on the disk before the line was written, so that what it names is there after a
power failure as after a kill; or says that the output is about to be put in place, and which inode it is. A line begins with the
CRC-32 of its text: what follows the last whole line was being written when the end came, and counts for nothing.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma2tool.storage.staging.lock import JOURNAL as NAME
from gemma2tool.storage.syscalls import retrying, sync_data, sync_folder, translate_os_errors

MAX_BYTES = 64 << 20

Fingerprint = Mapping[str, str]
"""What must be the same, by what a person calls it: "tool", "type", "model.safetensors", ..."""


@dataclass(frozen=True)
class Piece:
    """A piece that is complete: the files it lies in, and what its writer wants to remember of it (JSON)."""

    files: tuple[str, ...]
    record: Any = None


@dataclass
class Found:
    """What an earlier run wrote down. ``placed``: the inode of the output that was about to be put in place."""

    fingerprint: dict[str, str]
    pieces: dict[str, Piece] = field(default_factory=dict)
    placed: int | None = None
    length: int = 0
    """Bytes of the whole lines."""

    def differences(self, wanted: Fingerprint) -> list[str]:
        """What is not the same, a phrase each: ``type was q8_0, is q4_0``."""
        names = [*wanted, *(name for name in self.fingerprint if name not in wanted)]
        said = []
        for name in names:
            before, now = self.fingerprint.get(name, "absent"), wanted.get(name, "absent")
            if before != now:
                said.append(f"{name} was {before}, is {now}")
        return said


def read(place_fd: int) -> Found | None:
    """The journal of a staging place; None where there is none that says what it is of."""
    try:
        fd = os.open(NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=place_fd)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_size > MAX_BYTES:
            return None
        with open(fd, "rb", closefd=False) as file:
            return _parse(file.read())
    finally:
        os.close(fd)


def _parse(data: bytes) -> Found | None:
    found: Found | None = None
    length = 0
    for line in data.splitlines(keepends=True):
        content = _content(line)
        try:
            if found is None:
                found = Found({str(name): str(value) for name, value in content["fingerprint"].items()})
            elif "placing" in content:
                found.placed = int(content["placing"])
            else:
                for name, files, record in content["done"]:
                    found.pieces[str(name)] = Piece(tuple(map(str, files)), record)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            break
        length += len(line)
    if found is not None:
        found.length = length
    return found


def _content(line: bytes) -> Any:
    crc, _, text = line.partition(b" ")
    if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
        return None
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):
        return None


class Journal:
    """The journal of this run, open for adding to it. ``continued``: the one of an earlier run, kept; None begins anew."""

    def __init__(self, place_fd: int, path: Path, fingerprint: Fingerprint, continued: Found | None) -> None:
        self.path = path / NAME
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (0 if continued else os.O_EXCL)
        with translate_os_errors(self.path, "opening the journal"):
            self._fd = os.open(NAME, flags, 0o600, dir_fd=place_fd)
        self._length = 0
        try:
            if continued is not None:
                self._length = continued.length
                with translate_os_errors(self.path, "opening the journal"):
                    retrying(os.ftruncate, self._fd, continued.length)
            else:
                self._append({"fingerprint": dict(fingerprint)})
                with translate_os_errors(self.path, "making the folder durable"):
                    sync_folder(place_fd)
        except BaseException:
            self.close()
            raise

    def done(self, pieces: Mapping[str, Piece]) -> None:
        """Adds pieces whose bytes are durable."""
        if pieces:
            self._append({"done": [[name, piece.files, piece.record] for name, piece in pieces.items()]})

    def placing(self, inode: int) -> None:
        """Says that the whole output, of this inode, is about to be put in place."""
        self._append({"placing": inode})

    def _append(self, content: object) -> None:
        text = json.dumps(content, separators=(",", ":")).encode() + b"\n"
        line = b"%08x %s" % (zlib.crc32(text), text)
        with translate_os_errors(self.path, "writing the journal", len(line)):
            done = 0
            while done < len(line):  # a torn line is written over by the next attempt
                done += retrying(os.pwrite, self._fd, line[done:], self._length + done)
            sync_data(self._fd)
        self._length += len(line)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
