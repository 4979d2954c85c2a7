"""Files of torch.save without an archive: what torch wrote before version 1.6, and still writes if asked to.

Five pickles (a magic number, a version, the machine, the objects, the keys of the storages), then each storage: the
number of its elements and their bytes. There are no checksums. Source: ``_legacy_save`` in torch/serialization.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma2tool.containers.torch_zip import pickle_index
from gemma2tool.containers.torch_zip.layout import DTYPE_BYTES
from gemma2tool.containers.torch_zip.tensor_refs import StorageRef
from gemma2tool.containers.torch_zip.zip_index import Member
from gemma2tool.errors import InputRefused
from gemma2tool.storage.reading import FileReader

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
MAX_PICKLE_BYTES = 32 << 20
ROOT = "legacy"
_COUNT_BYTES = 8


def read(reader: FileReader) -> tuple[Any, dict[str, Member]]:
    """The saved object, see ``pickle_index.interpret``, and the storages as members ``ROOT/data/KEY`` without a
    checksum. Raises InputRefused (``torch.legacy``, ``pickle.*``) unless they fill the file.
    """
    data = bytes(reader.pread(0, min(reader.size, MAX_PICKLE_BYTES)))
    where = str(reader.path)
    magic, _, end = pickle_index.interpret_next(data, 0, where)
    if type(magic) is not int or magic != MAGIC:
        raise _refusal(reader, "is a pickle, but not one of torch.save")
    version, _, end = pickle_index.interpret_next(data, end, where)
    machine, _, end = pickle_index.interpret_next(data, end, where)
    if version != VERSION or not isinstance(machine, dict):
        raise _refusal(reader, "has a version that torch never wrote")
    if machine.get("little_endian") is not True:
        raise _refusal(reader, "was saved on a big-endian machine; only little-endian files are read")
    tree, storages, end = pickle_index.interpret_next(data, end, where)
    keys, _, end = pickle_index.interpret_next(data, end, where)
    if type(keys) is not list or sorted(map(str, keys)) != sorted(storages):
        raise _refusal(reader, "lists other storages than its tensors have")
    return tree, _members(reader, [str(key) for key in keys], storages, end)


def _members(reader: FileReader, keys: list[str], storages: Mapping[str, StorageRef], offset: int) -> dict[str, Member]:
    members: dict[str, Member] = {}
    for key in keys:
        storage = storages[key]
        count = int.from_bytes(reader.pread(offset, _COUNT_BYTES), "little")
        if count != storage.count:
            raise _refusal(reader, f"has a storage of {count} elements where its tensors have {storage.count}")
        offset += _COUNT_BYTES
        size = count * (1 if storage.dtype is None else DTYPE_BYTES[storage.dtype])
        name = f"{ROOT}/data/{key}"
        members[name] = Member(name, offset, size, None)
        offset += size
        if offset > reader.size:
            raise _refusal(reader, f"has {reader.size} bytes, but its storages end at byte {offset} or later")
    if offset != reader.size:
        raise _refusal(reader, f"{reader.size - offset} bytes follow its last storage")
    return members


def _refusal(reader: FileReader, message: str) -> InputRefused:
    return InputRefused("torch.legacy", f"{reader.path}: {message}")
