"""Finds the bytes of each tensor in a file of torch.save, without running code from the file and without importing
torch.

The file is a zip archive of stored members: ``ROOT/data.pkl`` (a pickle), ``ROOT/data/KEY`` (one per storage),
``ROOT/version``, ``ROOT/byteorder`` and others; or it is without an archive, see ``legacy``. Sources:
torch/serialization.py, caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gemma2tool.containers import file_kind
from gemma2tool.containers.torch_zip import legacy, pickle_index, zip_index
from gemma2tool.containers.torch_zip.layout import DTYPE_BYTES, TorchZipLayout
from gemma2tool.containers.torch_zip.tensor_refs import TensorRef
from gemma2tool.containers.torch_zip.zip_index import Member
from gemma2tool.errors import InputRefused
from gemma2tool.storage.buffers import AnyBuffer
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

    ``name`` is its key in the innermost dict; ``dtype`` is spelled as in safetensors (and C64, C128); ``stride`` is in
    elements. ``offset`` is the byte of its first element from the start of the file, and ``nbytes`` the number of
    elements times their size. Its storage is the member ``member``: ``storage_nbytes`` bytes at ``storage_offset``,
    with the CRC-32 ``crc32`` (None: the file has none).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    nbytes: int
    crc32: int | None
    member: str
    storage_offset: int
    storage_nbytes: int

    @property
    def contiguous(self) -> bool:
        """Whether the ``nbytes`` bytes at ``offset`` are its elements in row-major order."""
        expected = 1
        for dim, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if dim > 1 and step != expected:
                return False
            expected *= dim
        return True

    @property
    def transposed(self) -> bool:
        """Whether the ``nbytes`` bytes at ``offset`` are the elements of a matrix column after column."""
        return len(self.shape) == 2 and self.stride == (1, self.shape[0])


def read_index(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the saved dict: nested dicts, lists and tuples of TorchTensor, int, float, str, bytes, bool and None.

    Every tensor is inside its storage, every storage inside its member, every member inside the file. A file without a
    byteorder record (torch before 2.1) is taken as little-endian, as torch does. Raises InputRefused (``torch.*``,
    ``zip.*``, ``pickle.*``).
    """
    with open_for_reading(path) as reader:
        if _is_legacy(reader):
            tree, members = legacy.read(reader)
            return _resolved(tree, reader.path, members, legacy.ROOT)
        members = zip_index.read_members(reader)
        root = _root(reader, members)
        if members.get(f"{root}/byteorder") and _read_small(reader, members[f"{root}/byteorder"], 16) != b"little":
            raise _refusal(
                reader.path, "byteorder", "was saved on a big-endian machine; only little-endian files are read"
            )
        pickle = _read_small(reader, members[f"{root}/data.pkl"], MAX_PICKLE_BYTES)
    return _resolved(pickle_index.interpret(pickle, str(reader.path)), reader.path, members, root)


def _resolved(tree: object, path: Path, members: Mapping[str, Member], root: str) -> dict[str, Any]:
    if type(tree) is not dict:
        raise _refusal(path, "not-a-dict", "does not contain a dict of tensors")
    index: dict[str, Any] = _Resolver(path, members, root).resolve(tree)
    return index


def tensors_of(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], TorchTensor]]:
    """Yields (path of keys, tensor) for every tensor reached through the dicts of ``tree``."""
    for key, value in tree.items():
        if isinstance(value, TorchTensor):
            yield (*prefix, key), value
        elif isinstance(value, Mapping):
            yield from tensors_of(value, (*prefix, key))


class MemberCheck:
    """Checks a storage's CRC-32 while its bytes are being read, in any order and from any thread.

    Use one per ``TorchTensor.member``, shared by the tensors in it. A storage is checked only when all of its bytes
    have been read.
    """

    def __init__(self, path: str | os.PathLike[str], tensor: TorchTensor) -> None:
        self.path = Path(path)
        self.tensor = tensor
        self._crc = Crc(tensor.storage_nbytes)

    def update(self, offset: int, data: AnyBuffer) -> None:
        """Adds ``data``, which was read at byte ``offset`` of the file.

        Raises InputRefused ``torch.crc`` if these were the last missing bytes and the CRC-32 does not match.
        """
        if self.tensor.crc32 is None or self._crc.is_complete():
            return
        self._crc.update(offset - self.tensor.storage_offset, data)
        if self._crc.is_complete() and self._crc.value != self.tensor.crc32:
            actual, stored = self._crc.value, self.tensor.crc32
            raise _refusal(
                self.path,
                "crc",
                f"the bytes of tensor {quoted(self.tensor.name)} have CRC-32 {actual:08x}, not {stored:08x}",
            )


def _refusal(path: Path, kind: str, message: str) -> InputRefused:
    return InputRefused(f"torch.{kind}", f"{path}: {message}")


def _is_legacy(reader: FileReader) -> bool:
    """Whether the file is one without an archive. Raises InputRefused for what torch.save never writes."""
    start = bytes(reader.pread(0, min(reader.size, 16)))
    if start.startswith(b"\x80"):
        return True
    if not start.startswith(zip_index.LOCAL_SIGNATURE):
        file_kind.refuse_foreign(reader, "torch")
        raise _refusal(reader.path, "not-zip", "was not written by torch.save")
    return False


def _root(reader: FileReader, members: Mapping[str, Member]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    if not roots:
        file_kind.refuse_foreign(reader, "torch")
    if len(roots) != 1 or "/" in roots[0] or not all(name.startswith(roots[0] + "/") for name in members):
        raise _refusal(reader.path, "archive", "has no data.pkl, or members outside a single top-level folder")
    if f"{roots[0]}/constants.pkl" in members:
        raise _refusal(
            reader.path,
            "torchscript",
            "is a TorchScript program, not a checkpoint",
        )
    return roots[0]


def _read_small(reader: FileReader, member: Member, limit: int) -> bytes:
    """Reads a member of at most ``limit`` bytes and checks its CRC-32."""
    if member.size > limit:
        raise _refusal(
            reader.path,
            "too-large",
            f"its member {quoted(member.name)} has {member.size} bytes; at most {limit} are accepted",
        )
    data = bytes(reader.pread(member.offset, member.size))
    if zlib.crc32(data) != member.crc32:
        raise _refusal(reader.path, "crc", f"the CRC-32 of its member {quoted(member.name)} does not match")
    return data


class _Resolver:
    """Turns the references in a pickle into places in the file, and a graph of objects into a tree."""

    def __init__(self, path: Path, members: Mapping[str, Member], root: str) -> None:
        self.path = path
        self.members = members
        self.root = root
        self.nodes = self.tensors = 0

    def resolve(self, value: Any, key: str = "", depth: int = 0) -> Any:
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise _refusal(
                self.path,
                "too-large",
                f"nests its objects more than {MAX_DEPTH} deep, or contains more than {MAX_NODES}",
            )
        if type(value) is TensorRef:
            self.tensors += 1
            if self.tensors > MAX_TENSORS:
                raise _refusal(self.path, "too-many-tensors", f"contains more than {MAX_TENSORS} tensors")
            return self.tensor(value, key)
        if type(value) is dict:
            return {key: self.resolve(item, key, depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.resolve(item, key, depth + 1) for item in value)
        if value is None or type(value) in (bool, int, float, str, bytes):
            return value
        # a dtype or storage outside a tensor says nothing about weights
        return str(getattr(value, "name", "storage"))

    def tensor(self, ref: TensorRef, name: str) -> TorchTensor:
        where = f"tensor {quoted(name)}"
        member = self.members.get(f"{self.root}/data/{ref.storage.key}")
        if member is None:
            raise _refusal(
                self.path, "storage-missing", f"{where}: its storage {quoted(ref.storage.key)} is not in the file"
            )
        itemsize = DTYPE_BYTES[ref.dtype]
        if ref.storage.count * (1 if ref.storage.dtype is None else itemsize) != member.size:
            raise _refusal(
                self.path,
                "storage-size",
                f"{where}: its storage has {member.size} bytes, which is not {ref.storage.count} elements",
            )
        capacity = member.size // itemsize
        # Without the zeros, so that a dimension of 0 does not hide an overflow of the others.
        if prod(dim for dim in ref.shape if dim) >= 1 << 60:
            raise _refusal(self.path, "overflow", f"{where}: the product of its shape {ref.shape} overflows")
        count = prod(ref.shape)
        if any(dim > 1 and step == 0 for dim, step in zip(ref.shape, ref.stride, strict=True)) and count:
            raise _refusal(self.path, "stride", f"{where}: repeats elements (stride 0)")
        last = ref.storage_offset + sum((dim - 1) * step for dim, step in zip(ref.shape, ref.stride, strict=True))
        fits = last < capacity and count <= capacity if count else ref.storage_offset <= capacity
        if not fits:
            raise _refusal(
                self.path, "bounds",
                f"{where}: shape {ref.shape}, stride {ref.stride} and offset {ref.storage_offset} extend "
                f"beyond its storage of {capacity} elements",
            )  # fmt: skip
        return TorchTensor(
            name, ref.dtype, ref.shape, ref.stride, member.offset + ref.storage_offset * itemsize, count * itemsize,
            member.crc32, member.name, member.offset, member.size,
        )  # fmt: skip
