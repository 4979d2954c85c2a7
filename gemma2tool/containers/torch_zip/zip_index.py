"""The table of a zip archive whose members are stored, not compressed, as torch.save writes them.

Every field is believed only where the central directory, each member's local header and the file's size agree, and the members
must cover the file: nothing may hide before, between, inside or after them (PKWARE APPNOTE 4.3).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NoReturn

from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import FileReader

MAX_MEMBERS = 25_000
MAX_DIRECTORY_BYTES = 8 << 20
MAX_MEMBER_NAME_BYTES = 1024

LOCAL = struct.Struct("<4s5H3I2H")  # signature, version, flags, method, time, date, crc, packed, size, name, extra
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR64 = struct.Struct("<4sIQI")
LOCAL_SIGNATURE, CENTRAL_SIGNATURE, END_SIGNATURE = b"PK\3\4", b"PK\1\2", b"PK\5\6"
END64_SIGNATURE, LOCATOR64_SIGNATURE, DESCRIPTOR_SIGNATURE = b"PK\6\6", b"PK\6\7", b"PK\7\x08"
ZIP64_EXTRA = 1
HAS_DESCRIPTOR = 1 << 3
_ENCRYPTED = 1 << 0 | 1 << 6 | 1 << 13
_U16, _U32 = 0xFFFF, 0xFFFFFFFF
_MAX_DESCRIPTOR = 24


@dataclass(frozen=True, slots=True)
class Member:
    """A stored member: its ``size`` bytes of data begin at ``offset`` in the file and should have the CRC-32 ``crc32``."""

    name: str
    offset: int
    size: int
    crc32: int


@dataclass(frozen=True, slots=True)
class _Record:
    """A member as the central directory tells it."""

    name: str
    raw_name: bytes
    flags: int
    crc32: int
    size: int
    header_offset: int


def read_members(reader: FileReader) -> dict[str, Member]:
    """name -> Member, in the order of the central directory. Raises InputRefused (``zip.*``)."""
    count, directory_offset, directory_size = _end_of_directory(reader)
    records = _directory(reader, count, directory_offset, directory_size)
    members: dict[str, Member] = {}
    end = 0
    for record in sorted(records, key=lambda record: record.header_offset):
        gap = record.header_offset - end
        if gap < 0:
            _refuse(reader, "overlap", f"the member {quoted(record.name)} overlaps the one before it")
        if gap > _MAX_DESCRIPTOR or (gap and not end):
            _refuse(reader, "gap", f"{gap} bytes before the member {quoted(record.name)} belong to no member")
        offset = _data_offset(reader, record)
        end = offset + record.size
        if end > directory_offset:
            _refuse(
                reader, "past-end", f"the member {quoted(record.name)} reaches beyond the members' part of the file"
            )
        members[record.name] = Member(record.name, offset, record.size, record.crc32)
    if directory_offset - end > _MAX_DESCRIPTOR:
        _refuse(reader, "gap", f"{directory_offset - end} bytes before the directory belong to no member")
    return {record.name: members[record.name] for record in records}


def _refuse(reader: FileReader, kind: str, message: str) -> NoReturn:
    raise InputRefused(
        f"zip.{kind}",
        f"{reader.path}: {message}",
        hint="the file is damaged, hostile or not written by torch.save; download it again or save it anew with torch.save",
    )


def _end_of_directory(reader: FileReader) -> tuple[int, int, int]:
    """(members, offset of the central directory, its size) from the records at the very end of the file."""
    if reader.size < END.size:
        _refuse(reader, "truncated", "is too short for a zip archive")
    end_offset = reader.size - END.size
    signature, disk, directory_disk, here, count, size, offset, comment = END.unpack(reader.pread(end_offset, END.size))
    if signature != END_SIGNATURE or comment:
        _refuse(
            reader, "end", "does not end with the end record of a zip archive: it was cut, or something was appended"
        )
    if disk not in (0, _U16) or directory_disk not in (0, _U16) or here != count:
        _refuse(reader, "multi-disk", "is one part of a zip archive in several parts")
    end = end_offset
    if end_offset >= LOCATOR64.size + END64.size:
        locator_offset = end_offset - LOCATOR64.size
        locator = LOCATOR64.unpack(reader.pread(locator_offset, LOCATOR64.size))
        if locator[0] == LOCATOR64_SIGNATURE:
            end = locator_offset - END64.size
            count, offset, size = _end64(reader, locator, end, (count, offset, size))
    if _U32 in (size, offset) and end == end_offset:
        _refuse(reader, "zip64", "needs zip64 records and has none")
    if offset + size != end:
        _refuse(reader, "directory", "its central directory does not end where the end record begins")
    if count > MAX_MEMBERS or size > MAX_DIRECTORY_BYTES:
        _refuse(reader, "too-many-members", f"says it has {count} members; at most {MAX_MEMBERS} are accepted")
    return count, offset, size


def _end64(reader: FileReader, locator: tuple, end: int, short: tuple[int, int, int]) -> tuple[int, int, int]:
    """The zip64 end record's (count, offset, size), which must agree with those in the ``short`` record that are not saturated."""
    _, disk, end64_offset, disks = locator
    if disk != 0 or disks > 1 or end64_offset != end:
        _refuse(reader, "zip64", "its zip64 locator does not point at the zip64 end record before it")
    signature, length, _, _, disk, directory_disk, here, count, size, offset = END64.unpack(
        reader.pread(end, END64.size)
    )
    if signature != END64_SIGNATURE or length != END64.size - 12:
        _refuse(reader, "zip64", "has a broken zip64 end record")
    if disk != 0 or directory_disk != 0 or here != count:
        _refuse(reader, "multi-disk", "is one part of a zip archive in several parts")
    for value, brief, saturated in zip((count, offset, size), short, (_U16, _U32, _U32), strict=True):
        if brief not in (value, saturated):
            _refuse(reader, "zip64", "its two end records contradict each other")
    return count, offset, size


def _directory(reader: FileReader, count: int, offset: int, size: int) -> list[_Record]:
    raw = bytes(reader.pread(offset, size))
    records: list[_Record] = []
    names: set[str] = set()
    at = 0
    for _ in range(count):
        if at + CENTRAL.size > size:
            _refuse(reader, "directory", "its central directory is shorter than its members")
        fields = CENTRAL.unpack_from(raw, at)
        (
            signature,
            _,
            _,
            flags,
            method,
            _,
            _,
            crc,
            packed,
            length,
            name_len,
            extra_len,
            comment_len,
            disk,
            _,
            _,
            header,
        ) = fields
        at += CENTRAL.size
        if signature != CENTRAL_SIGNATURE or at + name_len + extra_len + comment_len > size:
            _refuse(reader, "directory", "its central directory is broken")
        raw_name, extra = raw[at : at + name_len], raw[at + name_len : at + name_len + extra_len]
        at += name_len + extra_len + comment_len
        name = _member_name(reader, raw_name)
        if name in names:
            _refuse(reader, "duplicate-member", f"the member {quoted(name)} appears twice")
        names.add(name)
        if flags & _ENCRYPTED:
            _refuse(reader, "encrypted", f"the member {quoted(name)} is encrypted")
        if method != 0:
            _refuse(
                reader, "compressed", f"the member {quoted(name)} is compressed; torch.save stores members uncompressed"
            )
        if disk not in (0, _U16):
            _refuse(reader, "multi-disk", "is one part of a zip archive in several parts")
        length, packed, header = _widened(reader, name, extra, (length, packed, header))
        if packed != length:
            _refuse(
                reader,
                "size",
                f"the member {quoted(name)} is stored, but says it has {packed} bytes packed and {length} unpacked",
            )
        if length > reader.size:
            _refuse(reader, "size", f"the member {quoted(name)} says it has {length} bytes, more than the file")
        records.append(_Record(name, raw_name, flags, crc, length, header))
    if at != size:
        _refuse(reader, "directory", "its central directory is longer than its members")
    return records


def _member_name(reader: FileReader, raw: bytes) -> str:
    """A relative path of plain segments; nothing is ever extracted, but a name that tries to escape marks a hostile file."""
    if not 0 < len(raw) <= MAX_MEMBER_NAME_BYTES:
        _refuse(reader, "member-name", f"a member has a name of {len(raw)} bytes")
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        _refuse(reader, "member-name", f"the member name {quoted(raw)} is not UTF-8")
    if any(segment in ("", ".", "..") for segment in name.split("/")) or any(char in name for char in "\\\0:"):
        _refuse(reader, "member-name", f"the member name {quoted(name)} is not a plain relative path")
    return name


def _extra(reader: FileReader, name: str, extra: bytes, kind: int) -> bytes | None:
    """The body of the extra field ``kind``, of which there may be one."""
    at, found = 0, None
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        body = extra[at + 4 : at + 4 + length]
        if len(body) != length or (tag == kind and found is not None):
            break
        found = body if tag == kind else found
        at += 4 + length
    if at != len(extra):
        _refuse(reader, "extra", f"the member {quoted(name)} has broken extra fields")
    return found


def _widened(reader: FileReader, name: str, extra: bytes, values: tuple[int, ...]) -> list[int]:
    """32-bit ``values``, those that are saturated replaced from the zip64 extra field, which must hold exactly these."""
    body = _extra(reader, name, extra, ZIP64_EXTRA)
    wide = [value == _U32 for value in values]
    if len(body or b"") != 8 * sum(wide):
        _refuse(reader, "zip64", f"the member {quoted(name)} has a zip64 field that does not fit its sizes")
    numbers = iter(struct.unpack(f"<{sum(wide)}Q", body or b""))
    return [next(numbers) if is_wide else value for value, is_wide in zip(values, wide, strict=True)]


def _data_offset(reader: FileReader, record: _Record) -> int:
    """Where the member's data begin, once its local header has confirmed what the central directory says."""
    head_size = LOCAL.size + len(record.raw_name)
    raw = reader.pread(record.header_offset, head_size)
    signature, _, flags, method, _, _, crc, packed, size, name_len, extra_len = LOCAL.unpack_from(raw)
    where = f"the local header of the member {quoted(record.name)}"
    if signature != LOCAL_SIGNATURE:
        _refuse(reader, "local-header", f"{where} is missing")
    if name_len != len(record.raw_name) or raw[LOCAL.size :] != record.raw_name:
        _refuse(reader, "local-header", f"{where} has another name")
    later = bool(flags & HAS_DESCRIPTOR)  # sizes and CRC follow the data
    agree = (
        method == 0
        and flags == record.flags
        and (crc == record.crc32 or (later and crc == 0))
        and all(value in (record.size, _U32) or (later and value == 0) for value in (packed, size))
    )
    if not agree:
        _refuse(reader, "local-header", f"{where} contradicts the central directory")
    return record.header_offset + head_size + extra_len
