"""Archives: zip (torch.save, .keras, .npz) and tar. Members are read within limits, nothing is unpacked.

The standard library's readers are used, because they accept what loaders accept: compressed members, wrong checksums,
bytes before the archive.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gemma2tool.containers.pickle_program import MAGIC
from gemma2tool.containers.torch_zip import zip_index
from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.finding import ScanFinding
from gemma2tool.storage.quoting import quoted

MAX_MEMBERS = 25_000
MAX_MEMBER_BYTES = 64 << 20
"""Of a member that is read; of a larger one the beginning is."""
MAX_RATIO, MIN_BOMB = 200, 256 << 20
"""An archive is a bomb if it unpacks to so many times its size, and to so many bytes."""

_ENCRYPTED = 1 << 0 | 1 << 6
_LOCAL_LENGTHS = struct.Struct("<2H")
"""Of the name and the extra field, at the end of a local header."""
_NO_CONTENT = ("/version", "/byteorder", "/.data/serialization_id", "/.format_version", "/.storage_alignment")

MemberScan = Callable[[str, bytes, bool, Place], Iterator[ScanFinding]]
"""Scans a member: its name, its first bytes, whether these are all, its place."""

_ERRORS = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    OSError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    EOFError,
    LookupError,
)
"""What the readers raise for archives that are damaged, encrypted or compressed in another way."""


def scan_zip(path: Path, place: Place, scan_member: MemberScan) -> Iterator[ScanFinding]:
    """The findings of a zip archive and its members."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            yield from _names([member.filename for member in members], place)
            total = sum(member.file_size for member in members)
            if total > max(MIN_BOMB, MAX_RATIO * path.stat().st_size):
                yield place.finding("archive.bomb", f"its members have {total:,} bytes")
                return
            names = {member.filename for member in members}
            if is_program := any(name.endswith("/constants.pkl") for name in names):
                yield place.finding("torch.program", "it has constants.pkl and code")
            looked_at = [
                member
                for member in members
                if not (
                    member.is_dir() or is_torch_storage(member.filename) or (is_program and "/code/" in member.filename)
                )
            ]
            for member in looked_at[:MAX_MEMBERS]:
                yield from _member(archive, member, place, scan_member)
            if len(looked_at) > MAX_MEMBERS:
                yield _too_many(place)
    except _ERRORS as error:
        yield place.finding("archive.damaged", f"{type(error).__name__}: {quoted(str(error))}")


def _member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, place: Place, scan_member: MemberScan
) -> Iterator[ScanFinding]:
    part = place.part(member.filename)
    try:
        with archive.open(member) as stream:
            data = stream.read(MAX_MEMBER_BYTES)
    except _ERRORS as error:
        if member.flag_bits & _ENCRYPTED:
            yield part.finding("archive.unread", "it is encrypted")
        else:
            yield part.finding("archive.damaged", f"{type(error).__name__}: {quoted(str(error))}")
        try:
            data = _raw(archive, member)
        except _ERRORS:
            return
        if member.flag_bits & _ENCRYPTED and data[:2] not in MAGIC:
            return  # it is really encrypted, not only said to be
    yield from scan_member(member.filename, data, len(data) >= member.file_size, part)


def _raw(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """A member whatever its flags, its name in the local header and its checksum say: torch ignores them."""
    file = archive.fp
    assert file is not None, "the archive is open"
    file.seek(member.header_offset)
    name_bytes, extra_bytes = _LOCAL_LENGTHS.unpack(file.read(zip_index.LOCAL.size)[-_LOCAL_LENGTHS.size :])
    file.seek(name_bytes + extra_bytes, 1)
    data = file.read(min(member.compress_size, MAX_MEMBER_BYTES))
    if member.compress_type == zipfile.ZIP_DEFLATED:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, MAX_MEMBER_BYTES)
    return data


def scan_compressed(path: Path, place: Place, scan_member: MemberScan) -> Iterator[ScanFinding]:
    """The findings of a file that is compressed by itself, or of a tar archive that is."""
    openers: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
    try:
        with open(path, "rb") as file:
            opener = openers[file.read(2)]
        with opener(path) as stream:
            data = stream.read(MAX_MEMBER_BYTES)
    except _ERRORS as error:
        yield place.finding("archive.damaged", f"{type(error).__name__}: {quoted(str(error))}")
        return
    if data[257:262] == b"ustar":
        yield from scan_tar(path, place, scan_member)
    else:
        yield from scan_member(path.stem, data, len(data) < MAX_MEMBER_BYTES, place.part("unpacked"))


def scan_tar(path: Path, place: Place, scan_member: MemberScan) -> Iterator[ScanFinding]:
    """The findings of a tar archive, compressed or not, and its members."""
    try:
        with tarfile.open(path) as archive:
            total, names = 0, []
            for count, member in enumerate(archive):
                names.append(member.name)
                total += member.size
                if total > max(MIN_BOMB, MAX_RATIO * path.stat().st_size):
                    yield place.finding("archive.bomb", f"its members have more than {total:,} bytes")
                    break
                if count >= MAX_MEMBERS:
                    yield _too_many(place)
                    break
                if member.islnk() or member.issym():
                    names.append(str(Path(member.name).parent / member.linkname) if member.issym() else member.linkname)
                if member.isdev():
                    yield place.part(member.name).finding("archive.escape", "it is a device")
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is not None:
                    data = stream.read(MAX_MEMBER_BYTES)
                    yield from scan_member(member.name, data, len(data) >= member.size, place.part(member.name))
            yield from _names(names, place)
    except _ERRORS as error:
        yield place.finding("archive.damaged", f"{type(error).__name__}: {quoted(str(error))}")


def _too_many(place: Place) -> ScanFinding:
    return place.finding("archive.too-many", f"only the first {MAX_MEMBERS:,} were looked at")


def is_torch_storage(name: str) -> bool:
    """Whether a member of a torch archive holds plain numbers: ROOT/data/KEY, or a record of the format."""
    parts = name.split("/")
    return (len(parts) >= 3 and parts[-2] == "data" and parts[-1].isdigit()) or name.endswith(_NO_CONTENT)


def _names(names: list[str], place: Place) -> Iterator[ScanFinding]:
    escaping = [name for name in names if _escapes(name)]
    if escaping:
        more = f", and {len(escaping) - 1} more" if len(escaping) > 1 else ""
        yield place.finding("archive.escape", f"it has a member {quoted(escaping[0])}{more}")
    repeated = len(names) - len(set(names))
    if repeated and not place.file.endswith((".tar", ".gz", ".tgz")):
        yield place.finding("archive.damaged", f"{repeated} of its members have the name of another one")


def _escapes(name: str) -> bool:
    plain = name.replace("\\", "/")
    depth = 0
    for part in plain.split("/"):
        depth += -1 if part == ".." else part not in ("", ".")
        if depth < 0:
            return True
    return plain.startswith("/") or plain[1:3] == ":/"
