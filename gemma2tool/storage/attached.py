"""Folders whose files are read from elsewhere: from a hub, an object store, an archive.

A source attaches its files as a folder of stand-ins: sparse files with the names and sizes of the real ones, which take
no space. Whatever looks at names and sizes works as in any folder. Bytes are read by ``storage.reading`` alone, which
asks here first, so that they come from the source; nothing else opens a stand-in.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gemma2tool.errors import InputRefused, ResourceError
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.ranges import RangeFile

MAX_FILES = 10_000
_MAX_NAME_BYTES = 255


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: its size, and what opens it."""

    size: int
    open: Callable[[], RangeFile]


class AttachedFolder:
    """The files of a source by their names (relative, with "/"), as the folder ``path``.

    ``name``: of the folder. ``address``: what people know the source by. ``place``: the folder for the stand-ins;
    default is the system's for temporary files. Close it after everything that reads from it.
    """

    def __init__(self, name: str, address: str, files: Mapping[str, SourceFile], *, place: Path | None = None) -> None:
        self.address, self.files = address, dict(files)
        _check_names(address, self.files)
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

    def readable(self, text: str) -> str:
        """``text`` with the source's address instead of the path of the stand-ins."""
        return text.replace(str(self.path), self.address)

    def close(self) -> None:
        """Detach the files and remove the stand-ins."""
        if _attached.pop(str(self.path), None) is not None:
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


def open_file(path: str | os.PathLike[str]) -> RangeFile | None:
    """The file of a source behind a stand-in; None if ``path`` is not one."""
    if not _attached:
        return None
    text = os.path.abspath(path)
    for root, folder in list(_attached.items()):
        if text.startswith(root + os.sep):
            file = folder.files.get(text[len(root) + 1 :].replace(os.sep, "/"))
            return None if file is None else file.open()
    return None


def _check_names(address: str, files: Mapping[str, SourceFile]) -> None:
    """Refuse names that come from a server or an archive and would lead out of the folder."""
    if len(files) > MAX_FILES:
        raise InputRefused(
            "source.too-many-files", f"{address}: lists {len(files)} files; at most {MAX_FILES} are read"
        )
    folders: set[str] = set()
    for name in files:
        parts = name.split("/")
        if (
            any(part in ("", ".", "..") or len(os.fsencode(part)) > _MAX_NAME_BYTES for part in parts)
            or not name.isprintable()
            or "\\" in name
        ):
            raise InputRefused("source.name", f"{address}: the file name {quoted(name)} is not a plain relative path")
        folders.update(str(parent) for parent in PurePosixPath(name).parents)
    if both := folders & files.keys():
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
            "source.place", f"{address}: no place for stand-ins of its files{where}: {error.strerror}"
        ) from error
