"""The directory of a zip archive whose members are stored, not compressed, as torch.save writes them.

The central directory, each member's local header and the file's size must agree, and the members must cover the file:
nothing may be hidden before, between, inside or after them (PKWARE APPNOTE 4.3).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

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
    """A stored member: ``size`` bytes of data at ``offset`` in the file, with the CRC-32 ``crc32`` according to the
    archive; None: it has none."""

    name: str
    offset: int
    size: int
    crc32: int | None


@dataclass(frozen=True, slots=True)
class _Record:
    """A member as the central directory describes it."""

    name: str
    raw_name: bytes
    flags: int
    crc32: int
    size: int
    header_offset: int


def read_members(reader: FileReader) -> dict[str, Member]:
    """Reads the members by name, in the order of the central directory. Raises InputRefused (``zip.*``)."""
    count, directory_offset, directory_size = _end_of_directory(reader)
    records = _directory(reader, count, directory_offset, directory_size)
    members: dict[str, Member] = {}
    end = 0
    for record in sorted(records, key=lambda record: record.header_offset):
        gap = record.header_offset - end
        if gap < 0:
            raise _refusal(reader, "overlap", f"the member {quoted(record.name)} overlaps the previous one")
        if gap > _MAX_DESCRIPTOR or (gap and not end):
            raise _refusal(reader, "gap", f"{gap} bytes before the member {quoted(record.name)} belong to no member")
        offset = _data_offset(reader, record)
        end = offset + record.size
        if end > directory_offset:
            raise _refusal(reader, "past-end", f"the member {quoted(record.name)} extends into the central directory")
        members[record.name] = Member(record.name, offset, record.size, record.crc32)
    if directory_offset - end > _MAX_DESCRIPTOR:
        raise _refusal(reader, "gap", f"{directory_offset - end} bytes before the directory belong to no member")
    return {record.name: members[record.name] for record in records}


def _refusal(reader: FileReader, kind: str, message: str) -> InputRefused:
    return InputRefused(f"zip.{kind}", f"{reader.path}: {message}")


def _end_of_directory(reader: FileReader) -> tuple[int, int, int]:
    """Returns (members, offset of the central directory, its size) from the records at the very end of the file."""
    if reader.size < END.size:
        raise _refusal(reader, "truncated", "is too short for a zip archive")
    end_offset = reader.size - END.size
    signature, disk, directory_disk, here, count, size, offset, comment = END.unpack(reader.pread(end_offset, END.size))
    if signature != END_SIGNATURE or comment:
        raise _refusal(
            reader,
            "end",
            "does not end with the end record of a zip archive: it was truncated, or something was appended",
        )
    if disk not in (0, _U16) or directory_disk not in (0, _U16) or here != count:
        raise _refusal(reader, "multi-disk", "is one part of a multi-part zip archive")
    end = end_offset
    if end_offset >= LOCATOR64.size + END64.size:
        locator_offset = end_offset - LOCATOR64.size
        locator: tuple[bytes, int, int, int] = LOCATOR64.unpack(reader.pread(locator_offset, LOCATOR64.size))
        if locator[0] == LOCATOR64_SIGNATURE:
            end = locator_offset - END64.size
            count, offset, size = _end64(reader, locator, end, (count, offset, size))
    if _U32 in (size, offset) and end == end_offset:
        raise _refusal(reader, "zip64", "needs zip64 records but has none")
    if offset + size != end:
        raise _refusal(reader, "directory", "its central directory does not end where the end record begins")
    if count > MAX_MEMBERS or size > MAX_DIRECTORY_BYTES:
        raise _refusal(
            reader, "too-many-members", f"has a count of {count} members; at most {MAX_MEMBERS} are accepted"
        )
    return count, offset, size


def _end64(
    reader: FileReader, locator: tuple[bytes, int, int, int], end: int, short: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Returns (count, offset, size) of the zip64 end record. Those in ``short`` must agree unless saturated."""
    _, disk, end64_offset, disks = locator
    if disk != 0 or disks > 1 or end64_offset != end:
        raise _refusal(reader, "zip64", "its zip64 locator does not point at the zip64 end record before it")
    signature, length, _, _, disk, directory_disk, here, count, size, offset = END64.unpack(
        reader.pread(end, END64.size)
    )
    if signature != END64_SIGNATURE or length != END64.size - 12:
        raise _refusal(reader, "zip64", "has an invalid zip64 end record")
    if disk != 0 or directory_disk != 0 or here != count:
        raise _refusal(reader, "multi-disk", "is one part of a multi-part zip archive")
    for value, short_value, saturated in zip((count, offset, size), short, (_U16, _U32, _U32), strict=True):
        if short_value not in (value, saturated):
            raise _refusal(reader, "zip64", "its two end records contradict each other")
    return count, offset, size


class _CentralEntry(NamedTuple):
    """The fixed fields of an entry in the central directory."""

    signature: bytes
    made_by: int
    needed: int
    flags: int
    method: int
    time: int
    date: int
    crc32: int
    packed: int
    size: int
    name_bytes: int
    extra_bytes: int
    comment_bytes: int
    disk: int
    internal: int
    external: int
    header_offset: int


def _directory(reader: FileReader, count: int, offset: int, size: int) -> list[_Record]:
    raw = bytes(reader.pread(offset, size))
    records: list[_Record] = []
    names: set[str] = set()
    at = 0
    for _ in range(count):
        if at + CENTRAL.size > size:
            raise _refusal(reader, "directory", "its central directory is shorter than its members")
        entry = _CentralEntry(*CENTRAL.unpack_from(raw, at))
        at += CENTRAL.size
        extra_at = at + entry.name_bytes
        next_at = extra_at + entry.extra_bytes + entry.comment_bytes
        if entry.signature != CENTRAL_SIGNATURE or next_at > size:
            raise _refusal(reader, "directory", "its central directory has an invalid entry")
        raw_name, extra = raw[at:extra_at], raw[extra_at : extra_at + entry.extra_bytes]
        at = next_at
        name = _member_name(reader, raw_name)
        if name in names:
            raise _refusal(reader, "duplicate-member", f"the member {quoted(name)} appears twice")
        names.add(name)
        if entry.flags & _ENCRYPTED:
            raise _refusal(reader, "encrypted", f"the member {quoted(name)} is encrypted")
        if entry.method != 0:
            raise _refusal(
                reader, "compressed", f"the member {quoted(name)} is compressed; torch.save stores members uncompressed"
            )
        if entry.disk not in (0, _U16):
            raise _refusal(reader, "multi-disk", "is one part of a multi-part zip archive")
        length, packed, header = _widened(reader, name, extra, (entry.size, entry.packed, entry.header_offset))
        if packed != length:
            raise _refusal(
                reader,
                "size",
                f"the member {quoted(name)} is stored, but has a packed size of {packed} bytes and a size of {length}",
            )
        if length > reader.size:
            raise _refusal(
                reader, "size", f"the member {quoted(name)} has a size of {length} bytes, more than the file"
            )
        records.append(_Record(name, raw_name, entry.flags, entry.crc32, length, header))
    if at != size:
        raise _refusal(reader, "directory", "its central directory is longer than its members")
    return records


def _member_name(reader: FileReader, raw: bytes) -> str:
    """Checks that a name is a relative path of plain segments. Nothing is extracted, but other names indicate a hostile
    file."""
    if not 0 < len(raw) <= MAX_MEMBER_NAME_BYTES:
        raise _refusal(
            reader, "member-name", f"a member has a name of {len(raw)} bytes; 1 to {MAX_MEMBER_NAME_BYTES} are accepted"
        )
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refusal(reader, "member-name", f"the member name {quoted(raw)} is not UTF-8") from error
    if any(segment in ("", ".", "..") for segment in name.split("/")) or any(char in name for char in "\\\0:"):
        raise _refusal(reader, "member-name", f"the member name {quoted(name)} is not a plain relative path")
    return name


def _extra(reader: FileReader, name: str, extra: bytes, kind: int) -> bytes | None:
    """Returns the body of the extra field ``kind``, or None. There may be only one."""
    at = 0
    field: bytes | None = None
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        body = extra[at + 4 : at + 4 + length]
        if len(body) != length or (tag == kind and field is not None):
            break
        if tag == kind:
            field = body
        at += 4 + length
    if at != len(extra):
        raise _refusal(reader, "extra", f"the member {quoted(name)} has invalid extra fields")
    return field


def _widened(reader: FileReader, name: str, extra: bytes, values: tuple[int, ...]) -> list[int]:
    """Replaces saturated 32-bit ``values`` by those in the zip64 extra field, which must contain exactly these."""
    body = _extra(reader, name, extra, ZIP64_EXTRA)
    wide = [value == _U32 for value in values]
    if len(body or b"") != 8 * sum(wide):
        raise _refusal(reader, "zip64", f"the member {quoted(name)} has a zip64 field that does not fit its sizes")
    numbers = iter(struct.unpack(f"<{sum(wide)}Q", body or b""))
    return [next(numbers) if is_wide else value for value, is_wide in zip(values, wide, strict=True)]


def _data_offset(reader: FileReader, record: _Record) -> int:
    """Returns the offset of a member's data, after checking its local header against the central directory."""
    head_size = LOCAL.size + len(record.raw_name)
    raw = reader.pread(record.header_offset, head_size)
    signature, _, flags, method, _, _, crc, packed, size, name_len, extra_len = LOCAL.unpack_from(raw)
    where = f"the local header of the member {quoted(record.name)}"
    if signature != LOCAL_SIGNATURE:
        raise _refusal(reader, "local-header", f"{where} is missing")
    if name_len != len(record.raw_name) or raw[LOCAL.size :] != record.raw_name:
        raise _refusal(reader, "local-header", f"{where} has a different name")
    has_descriptor = bool(flags & HAS_DESCRIPTOR)  # sizes and CRC follow the data
    agree = (
        method == 0
        and flags == record.flags
        and (crc == record.crc32 or (has_descriptor and crc == 0))
        and all(value in (record.size, _U32) or (has_descriptor and value == 0) for value in (packed, size))
    )
    if not agree:
        raise _refusal(reader, "local-header", f"{where} contradicts the central directory")
    return record.header_offset + head_size + int(extra_len)
