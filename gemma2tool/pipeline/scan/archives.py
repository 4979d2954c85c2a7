"""Archives: zip (torch.save, .keras, .npz), tar, and files that are compressed by themselves, inside of each other too.
Members are read within limits, nothing is unpacked.

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
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Any

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
MAX_DEPTH = 5
"""Of archives inside of each other: a .tar.gz of torch's archives is three."""

_ENCRYPTED = 1 << 0 | 1 << 6
_LOCAL_LENGTHS = struct.Struct("<2H")
"""Of the name and the extra field, at the end of a local header."""
_NO_CONTENT = ("/version", "/byteorder", "/.data/serialization_id", "/.format_version", "/.storage_alignment")
_UNREAD = {
    b"\x28\xb5\x2f\xfd": "a Zstandard archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x04\x22\x4d\x18": "an LZ4 archive",
}
"""What is only named."""
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".lzma", ".z", ".zlib", ".tgz", ".tbz2", ".txz")
_PROBE_BYTES = 1 << 20
_LZMA_MEMORY = 256 << 20

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


class _TooMuch(Exception):
    """The archives in a file unpack to more bytes than they may."""


def _most_bytes(nbytes: int) -> int:
    """What an archive of so many bytes may unpack to."""
    return max(MIN_BOMB, MAX_RATIO * nbytes)


@dataclass
class Unpacked:
    """How many bytes all archives in one file may still unpack to."""

    left: int

    @classmethod
    def of_file(cls, nbytes: int) -> Unpacked:
        """The limit for a file of so many bytes."""
        return cls(_most_bytes(nbytes))

    def read(self, stream: IO[bytes]) -> bytes:
        """The first bytes of a member. Raises ``_TooMuch`` beyond the limit."""
        data = stream.read(min(MAX_MEMBER_BYTES, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise _TooMuch
        return data


@dataclass(frozen=True)
class Content:
    """A file or a member of an archive.

    ``stream``: its bytes, or the first of them. ``nbytes``: how many it has, ``held`` of which the stream has.
    ``path``: where it is a file. ``depth``: in how many archives it is.
    """

    name: str
    stream: IO[bytes]
    nbytes: int
    held: int
    unpacked: Unpacked
    path: Path | None = None
    depth: int = 0

    @property
    def whole(self) -> bool:
        """Whether the stream has all bytes."""
        return self.held >= self.nbytes

    def head(self, nbytes: int) -> bytes:
        """The first bytes, at most as many as the stream has."""
        self.stream.seek(0)
        return self.stream.read(nbytes)

    def member(self, name: str, data: bytes, nbytes: int) -> Content:
        """A member of this archive, of whose ``nbytes`` bytes ``data`` is the beginning."""
        return replace(
            self, name=name, stream=BytesIO(data), nbytes=nbytes, held=len(data), path=None, depth=self.depth + 1
        )


Scan = Callable[[Content, Place], Iterator[ScanFinding]]
"""Scans a member."""


def kind_of(head: bytes) -> str:
    """What archive a file is that begins with ``head``: "zip", "tar", "gzip", "bzip2", "xz", "lzma", "zlib"; a
    sentence's end for one that is not read ("a RAR archive"); "" for anything else.
    """
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return "zip"
    if head[257:262] == b"ustar" or _is_old_tar(head):
        return "tar"
    if head.startswith(b"\x1f\x8b\x08"):
        return "gzip"
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return "bzip2"
    if head.startswith(b"\xfd7zXZ\0"):
        return "xz"
    with suppress(*_ERRORS):
        if head.startswith(b"\x5d\0\0") and _legacy_lzma().decompress(head, _PROBE_BYTES):
            return "lzma"
        # Two bytes that other files begin with, too: the stream must go on as one, as far as it is known.
        begins_as_zlib = head[:1] == b"x" and int.from_bytes(head[:2]) % 31 == 0
        if begins_as_zlib and zlib.decompressobj().decompress(head, _PROBE_BYTES):
            return "zlib"
    return next((text for magic, text in _UNREAD.items() if head.startswith(magic)), "")


def _legacy_lzma() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(format=lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY)


def _is_old_tar(head: bytes) -> bool:
    """Whether the first header has the checksum of a tar archive, whatever its magic number says."""
    if len(head) < tarfile.BLOCKSIZE:
        return False
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except (tarfile.HeaderError, *_ERRORS):
        return False
    return True


def scan_archive(content: Content, kind: str, place: Place, scan: Scan) -> Iterator[ScanFinding]:
    """The findings of an archive of a ``kind`` that ``kind_of`` names, and of its members."""
    scans = {"zip": _zip, "tar": _tar}
    if kind in _UNREAD.values():
        yield place.finding("archive.unread", f"it is {kind}")
    elif content.depth >= MAX_DEPTH:
        yield place.finding("archive.unread", f"it is in {content.depth} other archives", severity="odd")
    elif not content.whole:
        yield place.finding("archive.unread", f"an archive in an archive, of more than {MAX_MEMBER_BYTES >> 20} MiB")
    else:
        content.stream.seek(0)
        try:
            yield from scans.get(kind, _compressed)(content, place, scan)
        except _TooMuch:
            yield place.finding("archive.bomb", "it unpacks to far more bytes than it has")
        except _ERRORS as error:
            yield place.finding("archive.damaged", f"{type(error).__name__}: {quoted(str(error))}")


def scan_appended(content: Content, place: Place, scan: Scan) -> Iterator[ScanFinding]:
    """The findings of a zip archive at the end of another file: readers of zip archives look there."""
    if not content.whole:
        return
    try:
        if not zipfile.is_zipfile(content.stream) or not zipfile.ZipFile(content.stream).namelist():
            return
    except _ERRORS:
        return
    yield from scan_archive(content, "zip", place.part("archive at its end"), scan)


def _zip(content: Content, place: Place, scan: Scan) -> Iterator[ScanFinding]:
    with zipfile.ZipFile(content.stream) as archive:
        members = archive.infolist()
        yield from _names([member.filename for member in members], place, unique=True)
        total = sum(member.file_size for member in members)
        if total > _most_bytes(content.nbytes):
            yield place.finding("archive.bomb", f"its members have {total:,} bytes")
            return
        first = min((member.header_offset for member in members), default=content.nbytes)
        if first and content.head(4) == b"PK\3\4":
            yield place.finding("archive.damaged", f"another archive, of {first:,} bytes, is before its first member")
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
            yield from _member(archive, member, (content, place, scan))
        if len(looked_at) > MAX_MEMBERS:
            yield _too_many(place)


def _member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, within: tuple[Content, Place, Scan]
) -> Iterator[ScanFinding]:
    content, place, scan = within
    part = place.part(member.filename)
    try:
        with archive.open(member) as stream:
            data = content.unpacked.read(stream)
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
    yield from scan(content.member(member.filename, data, member.file_size), part)


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


def _compressed(content: Content, place: Place, scan: Scan) -> Iterator[ScanFinding]:
    """A file that is compressed by itself, which may be a tar archive."""
    kind = kind_of(content.head(_PROBE_BYTES))
    content.stream.seek(0)
    openers: dict[str, Callable[[Any], Any]] = {
        "gzip": lambda stream: gzip.GzipFile(fileobj=stream),
        "bzip2": bz2.BZ2File,
        "xz": lzma.LZMAFile,
        "lzma": lambda stream: _beginning(_legacy_lzma(), stream),
        "zlib": lambda stream: _beginning(zlib.decompressobj(), stream),
    }
    with openers[kind](content.stream) as stream:
        head = stream.read(tarfile.BLOCKSIZE)
        stream.seek(0)
        if kind_of(head) == "tar":
            yield from _tar(replace(content, stream=stream), place, scan)
            return
        data = content.unpacked.read(stream)
        more = len(data) >= MAX_MEMBER_BYTES
        is_bomb = more and _goes_on(stream, content, len(data))
    if is_bomb:
        yield place.finding("archive.bomb", f"its {content.nbytes:,} bytes unpack to more than {len(data):,}")
    elif more:
        yield place.finding("archive.unread", f"only the first {len(data):,} bytes that it unpacks to were looked at")
    name = PurePosixPath(content.name)
    inner = content.member(name.stem if name.suffix.lower() in _COMPRESSIONS else content.name, data, len(data) + more)
    yield from scan(inner, place.part("unpacked"))


def _goes_on(stream: IO[bytes], content: Content, nbytes: int) -> bool:
    """Whether a file, of whose content ``nbytes`` bytes were read, unpacks to more than it may: counted if all of it
    was needed for these, else estimated by what was needed.
    """
    needed, limit = content.stream.tell(), _most_bytes(content.nbytes)
    if needed < content.nbytes:
        return nbytes * content.nbytes > limit * max(needed, 1)
    while nbytes <= limit and (data := stream.read(1 << 20)):
        nbytes += len(data)
    return nbytes > limit


def _beginning(decompressor: Any, stream: IO[bytes]) -> BytesIO:
    """What the first bytes of a stream decompress to."""
    return BytesIO(decompressor.decompress(stream.read(MAX_MEMBER_BYTES), MAX_MEMBER_BYTES))


def _tar(content: Content, place: Place, scan: Scan) -> Iterator[ScanFinding]:
    with tarfile.open(fileobj=content.stream, mode="r:") as archive:
        total, names = 0, []
        for count, member in enumerate(archive):
            names.append(member.name)
            total += member.size
            if total > _most_bytes(content.nbytes):
                yield place.finding("archive.bomb", f"its members have more than {total:,} bytes")
                break
            if count >= MAX_MEMBERS:
                yield _too_many(place)
                break
            if member.islnk() or member.issym():
                names.append(str(Path(member.name).parent / member.linkname) if member.issym() else member.linkname)
            if member.isdev():
                yield place.part(member.name).finding("archive.escape", "it is a device")
            # Whoever unpacks it takes a member of an unknown type for a file.
            is_file = member.isfile() or member.type not in tarfile.SUPPORTED_TYPES
            stream = archive.extractfile(member) if is_file else None
            if stream is not None:
                data = content.unpacked.read(stream)
                yield from scan(content.member(member.name, data, member.size), place.part(member.name))
        yield from _names(names, place, unique=False)


def _too_many(place: Place) -> ScanFinding:
    return place.finding("archive.too-many", f"only the first {MAX_MEMBERS:,} were looked at")


def is_torch_storage(name: str) -> bool:
    """Whether a member of a torch archive holds plain numbers: ROOT/data/KEY, or a record of the format."""
    parts = name.split("/")
    return (len(parts) >= 3 and parts[-2] == "data" and parts[-1].isdigit()) or name.endswith(_NO_CONTENT)


def _names(names: list[str], place: Place, *, unique: bool) -> Iterator[ScanFinding]:
    escaping = [name for name in names if _escapes(name)]
    if escaping:
        more = f", and {len(escaping) - 1} more" if len(escaping) > 1 else ""
        yield place.finding("archive.escape", f"it has a member {quoted(escaping[0])}{more}")
    repeated = len(names) - len(set(names))
    if repeated and unique:
        yield place.finding("archive.damaged", f"{repeated} of its members share their name with another one")


def _escapes(name: str) -> bool:
    plain = name.replace("\\", "/")
    depth = 0
    for part in plain.split("/"):
        depth += -1 if part == ".." else part not in ("", ".")
        if depth < 0:
            return True
    return plain.startswith("/") or plain[1:3] == ":/"
