"""The index of a file that torch.save wrote: which bytes are which tensor, with no code of the file run and no torch imported.

Format: a zip archive of stored members ``ROOT/data.pkl`` (a pickle of protocol 2), ``ROOT/data/KEY`` (one storage each),
``ROOT/version``, ``ROOT/byteorder`` and others (torch/serialization.py; caffe2/serialize/inline_container.cc).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from gemma2tool.containers.torch_zip import pickle_index, zip_index
from gemma2tool.containers.torch_zip.layout import DTYPE_BYTES, TorchZipLayout
from gemma2tool.containers.torch_zip.pickle_index import TensorRef
from gemma2tool.containers.torch_zip.zip_index import Member
from gemma2tool.errors import InputRefused
from gemma2tool.storage.crc import Crc, crc32_combine
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import FileReader, open_for_reading

__all__ = ["Crc", "MemberCheck", "TorchTensor", "TorchZipLayout", "crc32_combine", "read_index", "tensors_of"]

MAX_PICKLE_BYTES = 32 << 20
MAX_TENSORS = 20_000
MAX_DEPTH = 16
MAX_NODES = 200_000


@dataclass(frozen=True, slots=True)
class TorchTensor:
    """A tensor as a view of a stored member of the archive.

    ``name`` is its key in the innermost dict, ``dtype`` as safetensors spells it (and C64, C128), ``stride`` in elements.
    ``offset`` is the absolute byte of its first element and ``nbytes`` its elements times their size. The storage it lies in is
    the member ``member``: ``storage_nbytes`` bytes from the absolute byte ``storage_offset`` on, with the CRC-32 ``crc32``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    nbytes: int
    crc32: int
    member: str
    storage_offset: int
    storage_nbytes: int

    @property
    def contiguous(self) -> bool:
        """Whether its ``nbytes`` bytes from ``offset`` on are its elements in row-major order."""
        expected = 1
        for dim, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if dim > 1 and step != expected:
                return False
            expected *= dim
        return True

    @property
    def covers_storage(self) -> bool:
        """Whether the CRC-32 of the member is that of this tensor's bytes."""
        return self.contiguous and self.nbytes == self.storage_nbytes


def read_index(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dict that was saved: nested dicts, lists and tuples whose leaves are TorchTensor, int, float, str, bytes, bool or None.

    Every tensor lies inside its storage, every storage inside its member, every member inside the file. Files without a byteorder
    record (torch before 2.1) are little-endian, as torch takes them. Raises InputRefused (``torch.*``, ``zip.*``, ``pickle.*``).
    """
    with open_for_reading(path) as reader:
        _check_kind(reader)
        members = zip_index.read_members(reader)
        root = _root(reader, members)
        if members.get(f"{root}/byteorder") and _small(reader, members[f"{root}/byteorder"], 16) != b"little":
            _refuse(reader.path, "byteorder", "was saved on a big-endian machine; only little-endian files are read")
        pickle = _small(reader, members[f"{root}/data.pkl"], MAX_PICKLE_BYTES)
    tree = pickle_index.interpret(pickle, str(reader.path))
    if type(tree) is not dict:
        _refuse(reader.path, "not-a-dict", "holds no dict of tensors")
    return _Resolver(reader.path, members, root).resolve(tree)


def tensors_of(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], TorchTensor]]:
    """(path of keys, tensor) for every tensor that dicts of ``tree`` lead to."""
    for key, value in tree.items():
        if isinstance(value, TorchTensor):
            yield (*prefix, key), value
        elif isinstance(value, Mapping):
            yield from tensors_of(value, (*prefix, key))


class MemberCheck:
    """Checks a storage's CRC-32 while its bytes stream past on their way elsewhere, in any order and from any thread.

    One for each ``TorchTensor.member``, shared by the tensors that lie in it. A storage of which some bytes are never read is not
    checked: nothing of them was used.
    """

    def __init__(self, path: str | os.PathLike[str], tensor: TorchTensor) -> None:
        self.path = Path(path)
        self.tensor = tensor
        self._crc = Crc(tensor.storage_nbytes)

    def update(self, offset: int, data: object) -> None:
        """Takes note of ``data``, read at the absolute byte ``offset``.

        Raises InputRefused ``torch.crc`` when these were the last bytes missing and the whole is not what was saved.
        """
        if self._crc.complete:
            return
        self._crc.update(offset - self.tensor.storage_offset, data)
        if self._crc.complete and self._crc.value != self.tensor.crc32:
            found, stored = self._crc.value, self.tensor.crc32
            _refuse(
                self.path,
                "crc",
                f"the bytes of tensor {quoted(self.tensor.name)} are damaged: their CRC-32 is {found:08x}, it was {stored:08x}",
            )


def _refuse(
    path: Path, kind: str, message: str, hint: str = "the file is damaged or hostile; download it again"
) -> NoReturn:
    raise InputRefused(f"torch.{kind}", f"{path}: {message}", hint=hint)


def _check_kind(reader: FileReader) -> None:
    start = bytes(reader.pread(0, min(reader.size, 16)))
    if start.startswith(b"\x80"):
        _refuse(
            reader.path, "legacy", "is a pickle, as torch.save wrote before version 1.6, which cannot be read safely",
            "load it with torch.load(path, weights_only=True) and torch.save it again",
        )  # fmt: skip
    if not start.startswith(zip_index.LOCAL_SIGNATURE):
        _refuse(
            reader.path,
            "not-zip",
            "is not a file that torch.save wrote",
            "give a .ckpt, .pt, .pth or .bin file of torch.save",
        )


def _root(reader: FileReader, members: Mapping[str, Member]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1 or "/" in roots[0] or not all(name.startswith(roots[0] + "/") for name in members):
        _refuse(reader.path, "archive", "has no data.pkl, or members beside its only folder")
    if f"{roots[0]}/constants.pkl" in members:
        _refuse(
            reader.path,
            "torchscript",
            "is a TorchScript program, not a checkpoint",
            "save its state_dict with torch.save",
        )
    return roots[0]


def _small(reader: FileReader, member: Member, limit: int) -> bytes:
    if member.size > limit:
        _refuse(
            reader.path,
            "too-large",
            f"its member {quoted(member.name)} has {member.size} bytes; at most {limit} are accepted",
        )
    data = bytes(reader.pread(member.offset, member.size))
    if zlib.crc32(data) != member.crc32:
        _refuse(reader.path, "crc", f"its member {quoted(member.name)} is damaged")
    return data


class _Resolver:
    """Turns the records of a pickle into places in the file, and a graph of objects into a tree."""

    def __init__(self, path: Path, members: Mapping[str, Member], root: str) -> None:
        self.path = path
        self.members = members
        self.root = root
        self.nodes = self.tensors = 0

    def resolve(self, value: Any, key: str = "", depth: int = 0) -> Any:
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            _refuse(
                self.path, "too-large", f"nests its objects more than {MAX_DEPTH} deep or holds more than {MAX_NODES}"
            )
        if type(value) is TensorRef:
            self.tensors += 1
            if self.tensors > MAX_TENSORS:
                _refuse(self.path, "too-many-tensors", f"holds more than {MAX_TENSORS} tensors")
            return self.tensor(value, key)
        if type(value) is dict:
            return {key: self.resolve(item, key, depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.resolve(item, key, depth + 1) for item in value)
        if value is None or type(value) in (bool, int, float, str, bytes):
            return value
        # a dtype or a storage that stands alone says nothing about weights
        return str(getattr(value, "name", "storage"))

    def tensor(self, ref: TensorRef, name: str) -> TorchTensor:
        where = f"tensor {quoted(name)}"
        member = self.members.get(f"{self.root}/data/{ref.storage.key}")
        if member is None:
            _refuse(self.path, "storage-missing", f"{where}: its storage {quoted(ref.storage.key)} is not in the file")
        itemsize = DTYPE_BYTES[ref.dtype]
        if ref.storage.count * (1 if ref.storage.dtype is None else itemsize) != member.size:
            _refuse(
                self.path,
                "storage-size",
                f"{where}: its storage has {member.size} bytes, not {ref.storage.count} elements",
            )
        capacity = member.size // itemsize
        # A dimension of 0 must not hide others whose product overflows.
        if prod(dim for dim in ref.shape if dim) >= 1 << 60:
            _refuse(self.path, "overflow", f"{where}: the product of its shape {ref.shape} overflows")
        count = prod(ref.shape)
        if any(dim > 1 and step == 0 for dim, step in zip(ref.shape, ref.stride, strict=True)) and count:
            _refuse(self.path, "stride", f"{where}: repeats elements (stride 0)")
        last = ref.storage_offset + sum((dim - 1) * step for dim, step in zip(ref.shape, ref.stride, strict=True))
        fits = last < capacity and count <= capacity if count else ref.storage_offset <= capacity
        if not fits:
            _refuse(
                self.path, "bounds",
                f"{where}: shape {ref.shape}, stride {ref.stride} and offset {ref.storage_offset} reach beyond its storage of "
                f"{capacity} elements",
            )  # fmt: skip
        return TorchTensor(
            name, ref.dtype, ref.shape, ref.stride, member.offset + ref.storage_offset * itemsize, count * itemsize,
            member.crc32, member.name, member.offset, member.size,
        )  # fmt: skip
