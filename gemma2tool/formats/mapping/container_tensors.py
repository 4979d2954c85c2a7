"""Tensors as containers hold them, before any format gives them a meaning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import ml_dtypes
import numpy as np

from gemma2tool.containers import safetensors, strict_json
from gemma2tool.containers.torch_zip import reader as torch_zip
from gemma2tool.errors import InputRefused
from gemma2tool.formats.base import Closers
from gemma2tool.formats.mapping.layout_transforms import BlocksTransposed
from gemma2tool.model.lazy import DTYPE_NAMES, Array, DType, LazyTensor
from gemma2tool.storage.paths import confined_path, path_within_folder
from gemma2tool.storage.reading import FileReader, open_for_reading

NUMPY_DTYPES: dict[str, DType] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
}
"""safetensors' names of types -> numpy's types."""

Tensor = TypeVar("Tensor", bound=LazyTensor)

MAX_INDEX_BYTES = 64 << 20
MAX_INDEXED = 20_000


class FileTensor(LazyTensor):
    """A C-contiguous tensor at a known place of an open file.

    ``check``: the checksum of the container's member that it lies in, computed while its bytes are read.
    """

    def __init__(
        self,
        reader: FileReader,
        offset: int,
        dtype: DType,
        shape: tuple[int, ...],
        origin: str,
        check: torch_zip.MemberCheck | None = None,
    ) -> None:
        self.reader, self.offset, self.check = reader, offset, check
        self.dtype, self.shape, self.origin = dtype, shape, origin
        self.stored = DTYPE_NAMES.get(dtype, dtype.name)

    def announce(self, first: int = 0, last: int | None = None) -> None:
        row_bytes = self.row_size * self.dtype.itemsize
        rows = (self.rows if last is None else last) - first
        self.reader.announce(self.offset + first * row_bytes, rows * row_bytes)

    def load_rows(self, first: int, last: int) -> Array:
        rows = np.empty((last - first, *self.shape[1:]), self.dtype)
        if rows.nbytes:
            row_bytes = self.row_size * self.dtype.itemsize
            start, data = self.offset + first * row_bytes, rows.reshape(-1).view(np.uint8).data
            self.reader.pread_into(start, data, ahead=(self.rows - last) * row_bytes)
            if self.check is not None:
                self.check.update(start, data)
        return rows


def open_safetensors(paths: Iterable[Path], closers: Closers) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors and the metadata of safetensors files together. Refuses a name that is in two files."""
    tensors: dict[str, LazyTensor] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        header = safetensors.read_header(path)
        reader = open_for_reading(path)
        closers.append(reader.close)
        metadata.update(header.metadata)
        for name, entry in header.tensors.items():
            _refuse_repeated(name, tensors, path)
            dtype = _numpy_dtype(entry.dtype, name, path)
            tensors[name] = FileTensor(reader, entry.offset, dtype, entry.shape, f"{path.name}: {name}")
    return tensors, metadata


def open_torch(tree: Mapping[str, object], path: Path, closers: Closers) -> dict[str, LazyTensor]:
    """The tensors of a flat state dict in a torch zip file (see ``torch_zip.read_index``), without other values."""
    reader = open_for_reading(path)
    closers.append(reader.close)
    tensors: dict[str, LazyTensor] = {}
    checks: dict[str, torch_zip.MemberCheck] = {}
    for name, entry in tree.items():
        if not isinstance(entry, torch_zip.TorchTensor):
            continue
        if not entry.contiguous and not entry.transposed:
            raise InputRefused(
                "torch.strides",
                f"{path.name}: {name} is stored with strides {entry.stride}, neither by rows nor by columns",
                hint="save the state dict again with contiguous tensors",
            )
        dtype = _numpy_dtype(entry.dtype, name, path)
        check = checks.setdefault(entry.member, torch_zip.MemberCheck(path, entry))
        shape = entry.shape if entry.contiguous else entry.shape[::-1]
        stored = FileTensor(reader, entry.offset, dtype, shape, f"{path.name}: {name}", check)
        tensors[name] = stored if entry.contiguous else BlocksTransposed(stored, 1)
    return tensors


def open_torch_shards(index: Path, closers: Closers) -> tuple[dict[str, LazyTensor], list[Path]]:
    """The tensors of the torch files that an index names, and the files, the index among them."""
    files, weight_map = indexed_files(index)
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        merge(tensors, open_torch(torch_zip.read_index(file), file, closers), file)
    check_index(index, weight_map, file_names(tensors))
    return tensors, [*files, index]


def file_names(tensors: Mapping[str, LazyTensor]) -> dict[str, str]:
    """The name of the file that each tensor is in."""
    return {name: tensor.origin.split(":", 1)[0] for name, tensor in tensors.items()}


def indexed_files(index: Path) -> tuple[list[Path], dict[str, str]]:
    """The shards that a ``*.index.json`` names, sorted by name, and its weight_map."""
    content = strict_json.load(
        path_within_folder(index), what=index.name, max_bytes=MAX_INDEX_BYTES, max_values=2 * MAX_INDEXED
    )
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputRefused(
            "index.weight-map",
            f"{index.name}: no weight_map from tensor names to files",
            hint="download the index again",
        )
    if len(weight_map) > MAX_INDEXED:
        raise InputRefused(
            "index.too-many-tensors",
            f"{index.name}: names {len(weight_map)} tensors; at most {MAX_INDEXED} are accepted",
            hint="download the index again",
        )
    files = [confined_path(index.parent, shard, what="shard") for shard in sorted(set(weight_map.values()))]
    return files, weight_map


def check_index(index: Path, weight_map: Mapping[str, str], files: Mapping[str, str]) -> None:
    """Refuse an index that does not match the shards; ``files`` is the file name of each tensor in them."""
    for name, file in weight_map.items():
        if files.get(name) != file:
            place = f"is in {files[name]}" if name in files else "is in none of its files"
            raise InputRefused(
                "index.mismatch",
                f"{index.name}: {name} should be in {file} but {place}",
                hint="the index and the shards do not belong together: download them again",
            )
    for name, file in files.items():
        if name not in weight_map:
            raise InputRefused(
                "index.mismatch",
                f"{index.name}: {file} holds {name}, which the index does not name",
                hint="the index and the shards do not belong together: download them again",
            )


def _refuse_repeated(name: str, tensors: Mapping[str, LazyTensor], path: Path) -> None:
    if name in tensors:
        raise InputRefused(
            "checkpoint.repeated-tensor",
            f"{path.name}: {name} is also in {tensors[name].origin.split(':')[0]}",
            hint="remove the file that does not belong to the checkpoint",
        )


def merge(into: dict[str, Tensor], more: Mapping[str, Tensor], path: Path) -> None:
    """Add the tensors of another shard to ``into``. Refuses a name that is there already."""
    for name, tensor in more.items():
        _refuse_repeated(name, into, path)
        into[name] = tensor


def _numpy_dtype(name: str, tensor: str, path: Path) -> DType:
    try:
        return NUMPY_DTYPES[name]
    except KeyError:
        raise InputRefused(
            "checkpoint.dtype", f"{path.name}: {tensor} has the type {name}, which no Gemma 2 file uses"
        ) from None
