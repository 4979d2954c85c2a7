"""Plans a torch.save file, so that every tensor's place is known before any data is.

The bytes equal those of torch.save 2.13 except for the serialization id, a 40-digit number that torch derives from the
order of a hash table. Sources: torch/serialization.py, CPython's _pickle.c, caffe2/serialize/inline_container.cc and
its copy of miniz.
"""

from __future__ import annotations

import struct
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from typing import Any

from gemma2tool.containers.torch_zip.tensor_refs import STORAGE_DTYPES, TORCH_DTYPES
from gemma2tool.containers.torch_zip.zip_index import (
    CENTRAL,
    CENTRAL_SIGNATURE,
    DESCRIPTOR_SIGNATURE,
    END,
    END64,
    END64_SIGNATURE,
    END_SIGNATURE,
    HAS_DESCRIPTOR,
    LOCAL,
    LOCAL_SIGNATURE,
    LOCATOR64,
    LOCATOR64_SIGNATURE,
    ZIP64_EXTRA,
)

ALIGNMENT = 64
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "I16": 2,
    "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8, "C128": 16,
}  # fmt: skip
_STORAGE_OF = {dtype: storage for storage, dtype in STORAGE_DTYPES.items()}
_TORCH_NAME_OF = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_UTF8_NAME = 1 << 11
_U16_MAX, _U32_MAX = 0xFFFF, 0xFFFFFFFF
_BATCH = 1000  # items per SETITEMS, as _BATCHSIZE in pickle.py

Key = tuple[str, ...]


class TorchZipLayout:
    """The place of everything in a torch.save file of nested dicts of tensors.

    ``tree`` maps names to (dtype, shape), strings or further mappings; an OrderedDict stays one. dtypes are spelled as
    in safetensors (and C64). A tensor is identified by its path of keys. ``offsets`` and ``sizes`` give the absolute
    place of each tensor in bytes, ``total_size`` the size of the file. Write the tensors at their places in any order,
    then everything that ``finish`` returns.
    """

    def __init__(self, tree: Mapping[str, Any], archive: str = "archive") -> None:
        pickler = _Pickler()
        pickle = pickler.dump(tree)
        self._fixed = {
            f"{archive}/data.pkl": pickle,
            f"{archive}/.format_version": b"1",
            f"{archive}/.storage_alignment": str(ALIGNMENT).encode(),
            f"{archive}/byteorder": b"little",
        }
        keys = {f"{archive}/data/{index}": path for index, path in enumerate(pickler.sizes)}
        self._id_name = f"{archive}/.data/serialization_id"
        last = {f"{archive}/version": b"3\n", self._id_name: bytes(40)}
        self._members: list[_Slot] = []
        cursor = 0
        for name, size in (
            *((name, len(data)) for name, data in self._fixed.items()),
            *((name, pickler.sizes[path]) for name, path in keys.items()),
            *((name, len(data)) for name, data in last.items()),
        ):
            slot = _Slot.at(cursor, name, size)
            self._members.append(slot)
            cursor = slot.end
        self._fixed |= last
        self._keys = keys
        self._directory_offset = cursor
        directory = sum(CENTRAL.size + len(slot.raw_name) + len(slot.zip64()) for slot in self._members)
        self.total_size = cursor + directory + END64.size + LOCATOR64.size + END.size
        self.sizes: dict[Key, int] = pickler.sizes
        self.offsets: dict[Key, int] = {keys[slot.name]: slot.data for slot in self._members if slot.name in keys}

    def finish(self, crcs: Mapping[Key, int]) -> list[tuple[int, bytes]]:
        """Returns (absolute offset, bytes) of everything except tensor data, given the CRC-32 of each tensor."""
        member_crcs = {name: crcs[path] for name, path in self._keys.items()}
        member_crcs |= {name: zlib.crc32(data) for name, data in self._fixed.items() if name != self._id_name}
        digest = sha256(repr(sorted(member_crcs.items())).encode()).digest()
        fixed = self._fixed | {self._id_name: str(int.from_bytes(digest) % 10**40).rjust(40, "0").encode()}
        member_crcs[self._id_name] = zlib.crc32(fixed[self._id_name])
        pieces: list[tuple[int, bytes]] = []
        for slot in self._members:
            pieces.append((slot.header, slot.local()))
            if slot.name in fixed:
                pieces.append((slot.data, fixed[slot.name]))
            pieces.append((slot.data + slot.size, slot.descriptor(member_crcs[slot.name])))
        directory = b"".join(slot.central(member_crcs[slot.name]) for slot in self._members)
        return [(at, data) for at, data in pieces if data] + [
            (self._directory_offset, directory + self._end(len(directory)))
        ]

    def _end(self, size: int) -> bytes:
        count, offset = len(self._members), self._directory_offset
        at = offset + size
        short_count = min(count, _U16_MAX)
        return (
            END64.pack(END64_SIGNATURE, END64.size - 12, 0x031E, 45, 0, 0, count, count, size, offset)
            + LOCATOR64.pack(LOCATOR64_SIGNATURE, 0, at, 1)
            + END.pack(END_SIGNATURE, 0, 0, short_count, short_count, min(size, _U32_MAX), min(offset, _U32_MAX), 0)
        )


@dataclass(frozen=True, slots=True)
class _Slot:
    """A member of the archive: its local header starts at ``header``, its aligned data at ``data``."""

    name: str
    raw_name: bytes
    header: int
    data: int
    size: int

    @classmethod
    def at(cls, header: int, name: str, size: int) -> _Slot:
        raw_name = name.encode()
        slot = cls(name, raw_name, header, 0, size)
        start = header + LOCAL.size + len(raw_name) + len(slot.zip64()) + 4  # 4: tag and length of the padding field
        return cls(name, raw_name, header, -(-start // ALIGNMENT) * ALIGNMENT, size)

    @property
    def end(self) -> int:
        return self.data + self.size + len(self.descriptor(0))

    @property
    def flags(self) -> int:
        return _UTF8_NAME | (HAS_DESCRIPTOR if self.size else 0)

    def zip64(self, packed: int | None = None) -> bytes:
        """The extra field with the numbers that do not fit in 32 bits."""
        wide = [self.size, self.size if packed is None else packed] if self.size >= _U32_MAX else []
        if self.header >= _U32_MAX:
            wide.append(self.header)
        return struct.pack(f"<HH{len(wide)}Q", ZIP64_EXTRA, 8 * len(wide), *wide) if wide else b""

    def local(self) -> bytes:
        # Sizes and CRC follow the data in a descriptor. miniz leaves even the 64-bit packed size 0 here.
        zip64 = self.zip64(packed=0)
        padding = self.data - self.header - LOCAL.size - len(self.raw_name) - len(zip64) - 4
        extra = zip64 + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        return (
            LOCAL.pack(LOCAL_SIGNATURE, 0, self.flags, 0, 0, 0, 0, 0, 0, len(self.raw_name), len(extra))
            + self.raw_name
            + extra
        )

    def descriptor(self, crc: int) -> bytes:
        if not self.size:
            return b""
        return struct.pack("<4sIQQ" if self.zip64() else "<4sIII", DESCRIPTOR_SIGNATURE, crc, self.size, self.size)

    def central(self, crc: int) -> bytes:
        zip64, size = self.zip64(), min(self.size, _U32_MAX)
        lengths = len(self.raw_name), len(zip64), 0
        head = CENTRAL.pack(
            CENTRAL_SIGNATURE, 0, 0, self.flags, 0, 0, 0, crc, size, size, *lengths, 0, 0, 0, min(self.header, _U32_MAX)
        )
        return head + self.raw_name + zip64


class _Pickler:
    """Writes the pickle that CPython's C pickler makes from nested dicts of torch tensors, protocol 2."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.memo: dict[object, int] = {}
        self.count = 0  # objects memoized
        self.sizes: dict[Key, int] = {}  # bytes of each storage, in the order of their keys

    def dump(self, tree: Mapping[str, Any]) -> bytes:
        self.mapping(tree, ())
        return bytes(self.out + b".")

    def mapping(self, tree: Mapping[str, Any], path: Key) -> None:
        if isinstance(tree, OrderedDict):
            self.empty_ordered_dict()
        else:
            self.out += b"}"
            self.put()
        items = list(tree.items())
        if len(items) == 1:
            self.item(items[0], path)
            self.out += b"s"
            return
        batches = [items[begin : begin + _BATCH] for begin in range(0, len(items), _BATCH)]
        if items and len(items) % _BATCH == 0 and not isinstance(tree, OrderedDict):
            batches.append([])  # the C loop over an exact dict notices the end only in the next batch
        for batch in batches:
            if len(batch) == 1 and isinstance(tree, OrderedDict):
                self.item(batch[0], path)
                self.out += b"s"
                continue
            self.out += b"("
            for item in batch:
                self.item(item, path)
            self.out += b"u"

    def item(self, item: tuple[str, Any], path: Key) -> None:
        key, value = item
        self.text(key)
        if isinstance(value, Mapping):
            self.mapping(value, (*path, key))
        elif isinstance(value, str):
            self.text(value)
        else:
            dtype, shape = value
            self.tensor(dtype, shape, (*path, key))

    def tensor(self, dtype: str, shape: Sequence[int], path: Key) -> None:
        shape = tuple(int(dim) for dim in shape)
        count, index = prod(shape), len(self.sizes)
        self.sizes[path] = count * DTYPE_BYTES[dtype]
        typed = dtype in _STORAGE_OF
        self.constant("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self.out += b"(("
        self.shared_text("storage")
        self.constant(*(("torch", _STORAGE_OF[dtype]) if typed else ("torch.storage", "UntypedStorage")))
        self.text(str(index))
        self.shared_text("cpu")
        self.integer(count if typed else self.sizes[path])
        self.out += b"t"
        self.put()
        self.out += b"Q"
        self.integer(0)
        self.sizes_tuple(shape)
        self.sizes_tuple([prod(max(dim, 1) for dim in shape[axis + 1 :]) for axis in range(len(shape))])
        self.out += b"\x89"  # requires_grad False
        self.empty_ordered_dict()  # backward_hooks
        if not typed:
            self.constant("torch", _TORCH_NAME_OF[dtype])
        self.out += b"t"
        self.put()
        self.out += b"R"
        self.put()

    def put(self) -> None:
        """Memoizes the object that was just written."""
        self.out += struct.pack("<cB", b"q", self.count) if self.count < 256 else struct.pack("<cI", b"r", self.count)
        self.count += 1

    def shared(self, key: object) -> bool:
        """Writes a reference to an object written before and returns True; otherwise remembers that it is about to be
        written."""
        index = self.memo.setdefault(key, self.count)
        if index == self.count:
            return False
        self.out += struct.pack("<cB", b"h", index) if index < 256 else struct.pack("<cI", b"j", index)
        return True

    def constant(self, module: str, name: str) -> None:
        if not self.shared((module, name)):
            self.out += f"c{module}\n{name}\n".encode()
            self.put()

    def text(self, text: str) -> None:
        raw = text.encode()
        self.out += struct.pack("<cI", b"X", len(raw)) + raw
        self.put()

    def shared_text(self, text: str) -> None:
        if not self.shared(text):
            self.text(text)

    def integer(self, value: int) -> None:
        if value <= 0xFF:
            self.out += struct.pack("<cB", b"K", value)
        elif value <= 0xFFFF:
            self.out += struct.pack("<cH", b"M", value)
        elif value < 1 << 31:
            self.out += struct.pack("<cI", b"J", value)
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little")
            self.out += struct.pack("<BB", 0x8A, len(raw)) + raw

    def sizes_tuple(self, values: Sequence[int]) -> None:
        if not values:
            self.out += b")"
            return
        if len(values) > 3:
            self.out += b"("
        for value in values:
            self.integer(value)
        self.out += {1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(values), b"t")
        self.put()

    def empty_ordered_dict(self) -> None:
        self.constant("collections", "OrderedDict")
        self.out += b")R"
        self.put()
