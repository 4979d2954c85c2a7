"""The journal of a staged output: which pieces are complete, so that a run that was killed can be continued.

The journal is beside the lock. Its first line is the *fingerprint* of the work: everything that must be the same for
the staged bytes to be usable. Each further line either names pieces whose bytes were on the disk before the line was
written, so they survive a power failure, or records the inode of the output that is about to be moved to its
destination. Each line starts with the CRC-32 of its text. Anything after the last valid line was being written when the
run ended and is ignored.
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
"""What must be the same, by its name in messages: "tool", "type", "model.safetensors", ..."""


@dataclass(frozen=True)
class Piece:
    """A complete piece: the files it was written to, and a JSON ``record`` that its writer wants back."""

    files: tuple[str, ...]
    record: Any = None


@dataclass
class EarlierRun:
    """What the journal of an earlier run says.

    ``placed_inode`` is the inode of the output that was about to be moved to its destination. ``valid_bytes`` is the
    length of the valid lines.
    """

    fingerprint: dict[str, str]
    pieces: dict[str, Piece] = field(default_factory=dict)
    placed_inode: int | None = None
    valid_bytes: int = 0

    def differences(self, fingerprint: Fingerprint) -> list[str]:
        """How ``fingerprint`` differs from this run's."""
        return differences(self.fingerprint, fingerprint)


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """How ``now`` differs from ``before``, one phrase per name: ``type was q8_0, is q4_0``."""
    names = [*now, *(name for name in before if name not in now)]
    pairs = {name: (before.get(name, "absent"), now.get(name, "absent")) for name in names}
    return [f"{name} was {old}, is {new}" for name, (old, new) in pairs.items() if old != new]


def read(place_fd: int) -> EarlierRun | None:
    """Reads the journal of a staging place. Returns None if there is none with a valid fingerprint."""
    try:
        fd = os.open(NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=place_fd)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_size > MAX_BYTES:
            return None
        with open(fd, "rb", closefd=False) as file:
            return parse(file.read())
    finally:
        os.close(fd)


def parse(data: bytes) -> EarlierRun | None:
    """Reads the bytes of a journal up to the last valid line.

    Returns None if the first line is not a valid fingerprint.
    """
    run: EarlierRun | None = None
    length = 0
    for line in data.splitlines(keepends=True):
        content = _line_content(line)
        try:
            if run is None:
                run = EarlierRun({str(name): str(value) for name, value in content["fingerprint"].items()})
            elif "placing" in content:
                run.placed_inode = int(content["placing"])
            else:
                for name, files, record in content["done"]:
                    run.pieces[str(name)] = Piece(tuple(map(str, files)), record)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            break
        length += len(line)
    if run is not None:
        run.valid_bytes = length
    return run


def _line_content(line: bytes) -> Any:
    """The JSON value of a line; None if the line is torn or damaged."""
    crc, _, text = line.partition(b" ")
    if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
        return None
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):
        return None


class Journal:
    """The journal of this run, open for appending.

    ``continued`` is the earlier run to continue; with None a new journal starts.
    """

    def __init__(self, place_fd: int, path: Path, fingerprint: Fingerprint, continued: EarlierRun | None) -> None:
        self.path = path / NAME
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (0 if continued else os.O_EXCL)
        with translate_os_errors(self.path, "opening the journal"):
            self._fd = os.open(NAME, flags, 0o600, dir_fd=place_fd)
        self._length = 0
        try:
            if continued is not None:
                self._length = continued.valid_bytes
                with translate_os_errors(self.path, "opening the journal"):
                    retrying(os.ftruncate, self._fd, continued.valid_bytes)
            else:
                self._append({"fingerprint": dict(fingerprint)})
                with translate_os_errors(self.path, "making the folder durable"):
                    sync_folder(place_fd)
        except BaseException:
            self.close()
            raise

    def done(self, pieces: Mapping[str, Piece]) -> None:
        """Records pieces whose bytes are durable."""
        if pieces:
            self._append({"done": [[name, piece.files, piece.record] for name, piece in pieces.items()]})

    def placing(self, inode: int) -> None:
        """Records that the complete output, with this inode, is about to be moved to its destination."""
        self._append({"placing": inode})

    def _append(self, content: object) -> None:
        text = json.dumps(content, separators=(",", ":")).encode() + b"\n"
        line = b"%08x %s" % (zlib.crc32(text), text)
        with translate_os_errors(self.path, "writing the journal", len(line)):
            done = 0
            while done < len(line):  # the next attempt overwrites a torn line
                done += retrying(os.pwrite, self._fd, line[done:], self._length + done)
            sync_data(self._fd)
        self._length += len(line)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
