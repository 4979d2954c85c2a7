"""Folders whose files are read from elsewhere: from a hub, an object store, an archive.

A source attaches its files as a folder of stand-ins: sparse files with the names and sizes of the real ones, which take
no space. Whatever looks at names and sizes works as in any folder. Bytes are read by ``storage.reading`` alone, which
asks here first, so that they come from the source; nothing else opens a stand-in.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gemma2tool.errors import InputRefused, ResourceError, renamed, stand_ins
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.ranges import RangeFile

MAX_FILES = 10_000
_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES, _MAX_DEPTH = 1024, 64
"""Of a file in a folder; the folder itself takes some of what systems allow."""


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: its size, what opens it, and the SHA-256 that the source states, if it does."""

    size: int
    open: Callable[[], RangeFile]
    sha256: str | None = None


class AttachedFolder:
    """The files of a source by their names (relative, with "/"), as the folder ``path``.

    ``name``: of the folder. ``address``: what people know the source by. ``place``: the folder for the stand-ins;
    default is the system's for temporary files. Close it after everything that reads from it.
    """

    def __init__(self, name: str, address: str, files: Mapping[str, SourceFile], *, place: Path | None = None) -> None:
        self.address, self.files = address, dict(files)
        check_names(address, self.files)
        with _disk_errors(address):
            self._root = Path(os.path.realpath(tempfile.mkdtemp(prefix=".gemma2tool-source-", dir=place)))
        self.path = self._root / _folder_name(name)
        try:
            with _disk_errors(address):
                self._make_stand_ins()
        except BaseException:
            shutil.rmtree(self._root, ignore_errors=True)
            raise
        _attached[str(self.path)] = self
        stand_ins[str(self.path)] = address

    def close(self) -> None:
        """Detach the files and remove the stand-ins."""
        if _attached.pop(str(self.path), None) is not None:
            stand_ins.pop(str(self.path), None)
            shutil.rmtree(self._root, ignore_errors=True)

    def _make_stand_ins(self) -> None:
        self.path.mkdir()
        for name, file in self.files.items():
            stand_in = self.path.joinpath(*name.split("/"))
            stand_in.parent.mkdir(parents=True, exist_ok=True)
            with stand_in.open("xb") as empty:
                empty.truncate(file.size)


_attached: dict[str, AttachedFolder] = {}
"""By the path of the folder."""


def address_of(path: str | os.PathLike[str]) -> str | None:
    """The address of what a stand-in stands for; None if ``path`` is not one."""
    text = os.path.abspath(path)
    return None if (address := renamed(text)) == text else address


def open_file(path: str | os.PathLike[str]) -> RangeFile | None:
    """The file of a source behind a stand-in; None if ``path`` is not one."""
    file = _find(path)
    return None if file is None else file.open()


def sha256_of(path: str | os.PathLike[str]) -> str | None:
    """The SHA-256 that a source states of the file behind a stand-in, if it does."""
    file = _find(path)
    return None if file is None else file.sha256


def _find(path: str | os.PathLike[str]) -> SourceFile | None:
    if not _attached:
        return None
    text = os.path.abspath(path)
    for root, folder in list(_attached.items()):
        if text.startswith(root + os.sep):
            return folder.files.get(text[len(root) + 1 :].replace(os.sep, "/"))
    return None


def check_names(address: str, files: Collection[str]) -> None:
    """Refuse names of files that come from a server or an archive and would lead out of their folder, or that are too
    many.
    """
    if len(files) > MAX_FILES:
        raise InputRefused(
            "source.too-many-files", f"{address}: lists {len(files)} files; at most {MAX_FILES} are read"
        )
    folders: set[str] = set()
    for name in files:
        parts = name.split("/")
        if (
            not name.isprintable()
            or any(part in ("", ".", "..") or len(os.fsencode(part)) > _MAX_NAME_BYTES for part in parts)
            or len(os.fsencode(name)) > _MAX_PATH_BYTES
            or len(parts) > _MAX_DEPTH
            or "\\" in name
        ):
            raise InputRefused("source.name", f"{address}: the file name {quoted(name)} is not a plain relative path")
        folders.update(str(parent) for parent in PurePosixPath(name).parents)
    if both := folders.intersection(files):
        raise InputRefused("source.name", f"{address}: {quoted(min(both))} is both a file and a folder")


def _folder_name(name: str) -> str:
    plain = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)[:_MAX_NAME_BYTES]
    return plain if plain.strip(".") else "source"


@contextmanager
def _disk_errors(address: str) -> Iterator[None]:
    """Errors of the system that concern the stand-ins, as ``ResourceError``."""
    try:
        yield
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise ResourceError(
            "source.place", f"{address}: cannot create placeholders of its files{where}: {error.strerror}"
        ) from error
