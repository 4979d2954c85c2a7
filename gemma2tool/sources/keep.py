"""Downloads that are kept: the files of a source, whole, in a local folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from gemma2tool.errors import InputRefused, ResourceError
from gemma2tool.sources.remote import Digest
from gemma2tool.storage import attached
from gemma2tool.storage.reading import FileReader, open_for_reading
from gemma2tool.storage.syscalls import free_bytes, translate_os_errors

RECORD = ".gemma2tool-source.json"
"""Beside the files: which version of each is complete, or begun."""
_PARTIAL = ".part"
_PIECE = 4 << 20
_SMALL = 64 << 20
_MARGIN = 64 << 20

Advance = Callable[[int, str], None]


def download(path: Path, folder: Path, advance: Advance = lambda nbytes, name: None) -> Path:
    """Copy the stand-ins at ``path`` to ``folder``, and return what stands for ``path`` there.

    With a file come the small files beside it. Files that are there in the same version are left, begun ones continued.
    """
    top = path if path.is_dir() else path.parent
    files = {file.relative_to(top).as_posix(): file for file in _wanted(path)}
    with translate_os_errors(folder, "making the folder"):
        folder.mkdir(parents=True, exist_ok=True)
    record = _read_record(folder)
    sizes = {name: file.stat().st_size for name, file in files.items()}
    _check_room(folder, sizes)
    for name, file in files.items():
        with open_for_reading(file) as reader:
            version = f"{attached.address_of(file)} {reader.version}"
            target = folder.joinpath(*name.split("/"))
            if record.get(name) == version and target.is_file() and target.stat().st_size == reader.size:
                advance(reader.size, name)
                continue
            if target.exists() and name not in record:
                raise InputRefused("source.kept", f"{target}: is in the way of a download that did not create it")
            resumes = record.get(name) == version
            record[name] = version
            _write_record(folder, record)
            sha256 = attached.sha256_of(file)
            _copy(reader, target, Digest("sha256", sha256) if sha256 else None, advance, resumes=resumes)
    return folder if path.is_dir() else folder / path.name


def total_size(path: Path) -> int:
    """Bytes of everything that ``download`` copies."""
    return sum(file.stat().st_size for file in _wanted(path))


def _wanted(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (file for file in sorted(path.rglob("*")) if file.is_file())
        return
    yield path
    for file in sorted(path.parent.iterdir()):
        if file.is_file() and file != path and file.stat().st_size <= _SMALL:
            yield file


def _copy(reader: FileReader, target: Path, digest: Digest | None, advance: Advance, *, resumes: bool) -> None:
    partial = target.with_name(target.name + _PARTIAL)
    content, buffer = None if digest is None else digest.hasher(reader.size), bytearray(_PIECE)
    with translate_os_errors(target, "writing it"):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not resumes:
            partial.unlink(missing_ok=True)
        with partial.open("a+b") as file:
            file.seek(0)
            position = 0
            while piece := file.read(_PIECE):
                if content is not None:
                    content.update(piece)
                position += len(piece)
            advance(position, target.name)
            while position < reader.size:
                view = memoryview(buffer)[: min(_PIECE, reader.size - position)]
                reader.pread_into(position, view, ahead=reader.size - position - len(view))
                file.write(view)
                if content is not None:
                    content.update(view)
                position += len(view)
                advance(len(view), target.name)
            file.flush()
            os.fsync(file.fileno())
        if digest is not None and content is not None:
            try:
                digest.check(content, str(reader.path))
            except InputRefused:
                partial.unlink()
                raise
        partial.replace(target)


def _check_room(folder: Path, sizes: Mapping[str, int]) -> None:
    needed = sum(sizes.values())
    places = (place for name in sizes for place in (folder / name, folder / (name + _PARTIAL)))
    present = sum(place.stat().st_size for place in places if place.exists())
    with translate_os_errors(folder, "asking for the free space"):
        free = free_bytes(folder)
    if free is not None and needed - present + _MARGIN > free:
        raise ResourceError("disk.full", f"{folder}: the download takes {needed:,} bytes, {free:,} are free")


def _read_record(folder: Path) -> dict[str, str]:
    try:
        content = json.loads((folder / RECORD).read_text())
        return {str(name): str(version) for name, version in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_record(folder: Path, record: Mapping[str, str]) -> None:
    with translate_os_errors(folder / RECORD, "writing it"):
        temporary = folder / (RECORD + _PARTIAL)
        temporary.write_text(json.dumps({"files": record}, indent=1))
        temporary.replace(folder / RECORD)
