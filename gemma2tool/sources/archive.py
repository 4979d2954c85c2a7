"""Models in tar archives, as Kaggle gives them.

A .tar is read in place: its files are ranges of it. A .tar.gz can only be read from its beginning, so it is unpacked
once, in one pass.
"""

from __future__ import annotations

import gzip
import io
import logging
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from gemma2tool.errors import InputRefused, ResourceError, stand_ins
from gemma2tool.storage.attached import MAX_FILES, AttachedFolder, SourceFile, check_names
from gemma2tool.storage.reading import FileReader, open_for_reading
from gemma2tool.storage.syscalls import free_bytes, translate_os_errors

logger = logging.getLogger("gemma2tool")

COMPRESSED = (".tar.gz", ".tgz")
SUFFIXES = (".tar", *COMPRESSED)
_CHECKSUM = re.compile(rb"[ \0]*[0-7]+[ \0]*")
_PIECE = 1 << 20
_MARGIN = 64 << 20


def is_something_else(path: Path) -> bool:
    """Whether a file named like an archive is neither compressed by gzip nor begins with a tar's header, of which the
    checksum is an octal number. A file that is too short may be a damaged one.
    """
    with open_for_reading(path) as reader:
        head = bytes(reader.pread(0, min(reader.size, tarfile.BLOCKSIZE)))
    if path.name.lower().endswith(COMPRESSED):
        return len(head) >= 2 and not head.startswith(b"\x1f\x8b")
    return len(head) == tarfile.BLOCKSIZE and any(head) and not _CHECKSUM.fullmatch(head[148:156])


class Member:
    """A file in a .tar: a range of it."""

    def __init__(self, reader: FileReader, offset: int, size: int) -> None:
        self._reader, self._offset, self.size, self.version = reader, offset, size, reader.version

    def read_into(self, offset: int, view: memoryview, ahead: int = 0) -> int:
        count = min(len(view), max(self.size - offset, 0))
        if count:
            ahead = min(ahead, self.size - offset - count)
            self._reader.pread_into(self._offset + offset, view[:count], ahead=ahead)
        return count

    def announce(self, offset: int, nbytes: int) -> None:
        self._reader.announce(self._offset + offset, min(nbytes, self.size - offset))

    def close(self) -> None: ...


class InPlace:
    """The files of a .tar as a folder, ``path``."""

    def __init__(self, archive: Path, address: str) -> None:
        self._reader = open_for_reading(archive)
        try:
            files: dict[str, SourceFile] = {}
            with _archive_errors(address), tarfile.open(fileobj=_Stream(self._reader), mode="r:") as tar:
                for name, member in _files(tar, address):
                    part = partial(Member, self._reader, member.offset_data, member.size)
                    files[name] = SourceFile(member.size, part)
                    if member.offset_data + member.size > self._reader.size:
                        raise InputRefused("source.archive", f"{address}: ends before the end of {name}")
            self._folder = AttachedFolder(_stem(archive), address, files)
        except BaseException:
            self._reader.close()
            raise
        self.path = _only_folder(self._folder.path)

    def close(self) -> None:
        self._folder.close()
        self._reader.close()


class Unpacked:
    """A .tar.gz, unpacked into a new folder in ``place`` (default: the system's for temporary files)."""

    def __init__(self, archive: Path, address: str, place: Path | None) -> None:
        self.address = address
        with translate_os_errors(place or Path(tempfile.gettempdir()), "making a folder"):
            self._root = Path(tempfile.mkdtemp(prefix=".gemma2tool-source-", dir=place)).resolve()
        self._folder = self._root / _stem(archive)
        stand_ins[str(self._folder)] = address
        logger.info("%s: unpacked into %s, until the command ends", address, self._root)
        try:
            with open_for_reading(archive) as reader, _archive_errors(address):
                self._unpack(reader, self._folder)
        except BaseException:
            self.close()
            raise
        self.path = _only_folder(self._folder)

    def close(self) -> None:
        stand_ins.pop(str(self._folder), None)
        shutil.rmtree(self._root, ignore_errors=True)

    def _unpack(self, reader: FileReader, folder: Path) -> None:
        with translate_os_errors(folder, "making the folder"):
            folder.mkdir()
        with gzip.GzipFile(fileobj=io.BufferedReader(_Stream(reader, sequential=True), _PIECE)) as content:
            with tarfile.open(fileobj=content, mode="r|") as tar:
                for name, member in _files(tar, self.address):
                    self._write(tar, member, folder.joinpath(*name.split("/")))
            while content.read(_PIECE):  # to its end, where the checksum is
                pass

    def _write(self, tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
        with translate_os_errors(self._root, "asking for the free space"):
            free = free_bytes(self._root)
        if free is not None and member.size + _MARGIN > free:
            raise ResourceError(
                "disk.full",
                f"{self.address}: its {path.name} takes {member.size:,} bytes, {free:,} are free"
                f" in {self._root.parent}",
            )
        source = tar.extractfile(member)
        assert source is not None, "only files are listed"
        with translate_os_errors(path, "writing it"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as target:
                target.writelines(_pieces(source, self.address))


def _pieces(source: IO[bytes], address: str) -> Iterator[bytes]:
    """The content of a member. What is wrong with the archive is not taken for a failure of what it is written to."""
    while True:
        with _archive_errors(address):
            piece = source.read(_PIECE)
        if not piece:
            return
        yield piece


def _files(tar: tarfile.TarFile, address: str) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The files of an archive by their names, which are checked before anything else is done with them."""
    names: set[str] = set()
    folders: set[str] = set()
    for member in tar:
        if member.isdir():
            continue
        name = member.name.removeprefix("./")
        if not member.isreg() or member.issparse():
            raise InputRefused("source.archive", f"{address}: holds {name!r}, which is a link or not a plain file")
        check_names(address, (name,))
        above = {str(parent) for parent in PurePosixPath(name).parents}
        if name in names or name in folders or above & names:
            raise InputRefused("source.archive", f"{address}: holds {name!r} twice, or as a file and a folder")
        names.add(name)
        folders |= above
        if len(names) > MAX_FILES:
            raise InputRefused("source.too-many-files", f"{address}: holds more than {MAX_FILES} files")
        yield name, member


def _stem(archive: Path) -> str:
    return (
        next(archive.name[: -len(end)] for end in (*COMPRESSED, ".tar") if archive.name.lower().endswith(end))
        or "model"
    )


def _only_folder(folder: Path) -> Path:
    """The folder in which all files of ``folder`` are."""
    while len(entries := list(folder.iterdir())) == 1 and entries[0].is_dir():
        folder = entries[0]
    return folder


class _Stream(io.RawIOBase):
    """A reader as a file object."""

    def __init__(self, reader: FileReader, *, sequential: bool = False) -> None:
        self._reader, self._sequential, self._position = reader, sequential, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._reader.size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(self._reader.size - self._position, 0)]
        left = self._reader.size - self._position - len(view)
        if view:
            self._reader.pread_into(self._position, view, ahead=left if self._sequential else 0)
        self._position += len(view)
        return len(view)


_DAMAGE = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, ValueError, OverflowError, RecursionError)
"""What the standard library's readers raise for archives that are damaged or that are not archives."""


@contextmanager
def _archive_errors(address: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise InputRefused("source.archive", f"{address}: is damaged or not a tar archive: {error}") from error
