"""SHA-256 of the files of an output, as sha256sum computes it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gemma2tool.model.progress import Advance
from gemma2tool.storage.reading import open_for_reading

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileDigest:
    """``name``: relative to the output, with "/" between folders; if the output is a single file, the file's own
    name."""

    name: str
    nbytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.nbytes, "sha256": self.sha256}


def file_names(output: Path) -> list[str]:
    """The names of an output's files, sorted; for a single file, its own name."""
    if not output.is_dir():
        return [output.name]
    return sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if not path.is_dir())


def file_path(output: Path, name: str) -> Path | None:
    """The path of the file ``name`` of an output; None if the name, which comes from a receipt, leads outside of it."""
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name or "\\" in name:
        return None
    if output.is_dir():
        return output.joinpath(*parts)
    return output if len(parts) == 1 else None


def digest_file(path: Path, name: str, advance: Advance | None = None) -> FileDigest:
    """The digest of a file, which is read once, a MiB at a time."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK_BYTES)
    with open_for_reading(path) as reader:
        for first in range(0, reader.size, _CHUNK_BYTES):
            piece = memoryview(buffer)[: min(_CHUNK_BYTES, reader.size - first)]
            reader.pread_into(first, piece, ahead=reader.size - first - len(piece))
            digest.update(piece)
            if advance is not None:
                advance(len(piece), name)
        return FileDigest(name, reader.size, digest.hexdigest())


def digest_files(
    output: Path, names: Sequence[str], *, threads: int = 1, advance: Advance | None = None
) -> list[FileDigest]:
    """The digests of the files ``names`` of ``output``, in that order; ``threads`` files at a time."""

    def digest(name: str) -> FileDigest:
        return digest_file(output / name if output.is_dir() else output, name, advance)

    with ThreadPoolExecutor(threads, thread_name_prefix="files") as pool:
        return list(pool.map(digest, names))
