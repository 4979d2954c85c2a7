"""SHA-256 of an output's files, as sha256sum gives it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gemma2tool.storage.reading import open_for_reading

_AT_ONCE = 1 << 20

Advance = Callable[[int, str], None]


@dataclass(frozen=True)
class FileDigest:
    """``name``: below the output, with "/" between folders; of an output that is one file, the file's own."""

    name: str
    nbytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.nbytes, "sha256": self.sha256}


def names_in(output: Path) -> list[str]:
    """The files of an output: its own name, or, of a folder, those below it, sorted."""
    if not output.is_dir():
        return [output.name]
    return sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if not path.is_dir())


def place(output: Path, name: str) -> Path | None:
    """The file ``name`` of an output; None for a name that leads elsewhere, which a receipt may try."""
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name or "\\" in name:
        return None
    if output.is_dir():
        return output.joinpath(*parts)
    return output if len(parts) == 1 else None


def digest_file(path: Path, name: str, advance: Advance | None = None) -> FileDigest:
    """Read a file once, a MiB at a time."""
    digest, buffer = hashlib.sha256(), bytearray(_AT_ONCE)
    with open_for_reading(path) as reader:
        for first in range(0, reader.size, _AT_ONCE):
            piece = memoryview(buffer)[: min(_AT_ONCE, reader.size - first)]
            reader.pread_into(first, piece)
            digest.update(piece)
            if advance is not None:
                advance(len(piece), name)
        return FileDigest(name, reader.size, digest.hexdigest())


def digest_files(
    output: Path, names: Sequence[str], *, threads: int = 1, advance: Advance | None = None
) -> list[FileDigest]:
    """The digests of the files ``names`` of ``output``, in that order; several files at a time, each in one go."""

    def one(name: str) -> FileDigest:
        return digest_file(output / name if output.is_dir() else output, name, advance)

    with ThreadPoolExecutor(threads, thread_name_prefix="files") as pool:
        return list(pool.map(one, names))
