"""The safetensors container: 8 bytes of header length, a JSON header, then the tensors' bytes without gaps.

Sources: the format's README and the validation in the safetensors crate 0.8 (``tensor.rs``), all of whose errors are
also raised here. In addition, duplicate keys, unknown fields and more than ``MAX_TENSORS`` tensors are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from gemma2tool.containers import file_kind, strict_json
from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import open_for_reading

MAX_HEADER_BYTES = 16 << 20  # the library allows 100 MB; 20,000 tensors need about 3 MB
MAX_TENSORS = 20_000
MAX_DIMS = 8
MAX_NAME_BYTES = 1 << 16

# Bits per element, in the order of the crate's Dtype enum, by which its writer sorts.
DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_BITS)}
_FIELDS = {"dtype", "shape", "data_offsets"}
_HEADER_ERRORS = {
    "json.utf8": "safetensors.invalid-header",
    "json.duplicate-key": "safetensors.duplicate-key",
    "json.too-many-values": "safetensors.too-many-tensors",
}
"""The id of a header that is not accepted as JSON, by the JSON error's id."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The place of a tensor.

    ``offset`` is from the start of the file; ``dtype`` is spelled as in the header (BF16, F32, ...).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """Everything in a safetensors file before its data. ``tensors`` is in header order."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, TensorEntry] = field(repr=False)
    data_start: int
    file_size: int


def read_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Reads the header of a safetensors file and checks it against the file's size.

    Raises InputRefused (``safetensors.*``).
    """
    path = Path(path)
    with open_for_reading(path) as reader:
        if reader.size < 8:
            file_kind.refuse_foreign(reader, "safetensors")
            raise _refusal("header-too-small", path, f"has {reader.size} bytes, too few for a header")
        length = int.from_bytes(reader.pread(0, 8), "little")
        if length > MAX_HEADER_BYTES:
            file_kind.refuse_foreign(reader, "safetensors")
            raise _refusal(
                "header-too-large",
                path,
                f"has a header length of {length} bytes; at most {MAX_HEADER_BYTES} are accepted",
            )
        if 8 + length > reader.size:
            raise _refusal(
                "invalid-header-length",
                path,
                f"has a header length of {length} bytes, but {reader.size} bytes in total",
            )
        raw = bytes(reader.pread(8, length))
        size = reader.size
        if not raw.lstrip(b" \t\r\n").startswith(b"{"):  # the library accepts white space
            file_kind.refuse_foreign(reader, "safetensors")
            raise _refusal("invalid-header-start", path, "its header does not begin with {")
    header = _parse(raw, path)
    metadata = _metadata(header.pop("__metadata__", {}), path)
    if len(header) > MAX_TENSORS:
        raise _refusal("too-many-tensors", path, f"contains {len(header)} tensors; at most {MAX_TENSORS} are accepted")
    start = 8 + length
    tensors = {name: _entry(name, info, start, path) for name, info in header.items()}
    _check_coverage(tensors, start, size, path)
    return SafetensorsHeader(path, metadata, tensors, start, size)


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        header: dict[str, Any] = strict_json.load(
            raw, what=f"{path}: header", max_bytes=MAX_HEADER_BYTES, max_depth=3, max_values=25 * MAX_TENSORS
        )
        return header
    except InputRefused as error:
        raise InputRefused(_HEADER_ERRORS.get(error.id, "safetensors.invalid-header-json"), error.message) from error


def _metadata(value: object, path: Path) -> dict[str, str]:
    if value is None:  # as MLX writes it where there is none
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _refusal("metadata", path, "__metadata__ does not map strings to strings")
    return value


def _entry(name: str, info: object, start: int, path: Path) -> TensorEntry:
    where = f"tensor {quoted(name)}"
    if len(name) > MAX_NAME_BYTES:
        raise _refusal("name-too-long", path, f"{where} has a name of {len(name)} characters")
    if not isinstance(info, dict) or info.keys() != _FIELDS:
        raise _refusal("tensor-fields", path, f"{where} must have exactly the fields dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _refusal("dtype", path, f"{where} has the unknown dtype {quoted(dtype)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise _refusal("shape", path, f"{where} has the shape {quoted(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _refusal("invalid-offset", path, f"{where} has the data_offsets {quoted(offsets)}")
    # Without the zeros, so that a dimension of 0 does not hide an overflow of the others.
    bits = prod(dim for dim in shape if dim) * DTYPE_BITS[dtype]
    if bits >= 1 << 63:
        raise _refusal("validation-overflow", path, f"{where}: the product of its shape {quoted(shape)} overflows")
    bits = bits if 0 not in shape else 0
    if bits % 8:
        raise _refusal("misaligned-slice", path, f"{where} does not end on a byte boundary")
    begin, end = offsets
    if end - begin != bits // 8:
        raise _refusal(
            "tensor-invalid-info",
            path,
            f"{where}: {dtype} {tuple(shape)} takes {bits // 8} bytes, but data_offsets give {end - begin}",
        )
    return TensorEntry(name, dtype, tuple(shape), start + begin, end - begin)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_coverage(tensors: Mapping[str, TensorEntry], start: int, size: int, path: Path) -> None:
    """Checks that the tensors, sorted by offset, have no gaps and no overlaps and end with the file."""
    end, previous = start, ""
    for entry in sorted(tensors.values(), key=lambda entry: (entry.offset, entry.offset + entry.nbytes)):
        if entry.offset < end:
            raise _refusal("overlap", path, f"tensors {quoted(previous)} and {quoted(entry.name)} overlap")
        if entry.offset > end:
            raise _refusal(
                "gap", path, f"{entry.offset - end} bytes before tensor {quoted(entry.name)} belong to no tensor"
            )
        end, previous = entry.offset + entry.nbytes, entry.name
    if size < end:
        raise _refusal("truncated", path, f"has {size} bytes, but its tensors end at byte {end}")
    if size > end:
        raise _refusal("trailing-bytes", path, f"{size - end} bytes follow its last tensor")


def _refusal(kind: str, path: Path, message: str) -> InputRefused:
    return InputRefused(f"safetensors.{kind}", f"{path}: {message}")


def layout(
    tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int], int]:
    """Returns the bytes before the data, each tensor's absolute offset (name -> offset), and the file's size.

    ``tensors`` are (name, dtype, shape). The result equals what ``safetensors.serialize`` 0.8.0 writes: tensors sorted
    by dtype, widest first, then by name in byte order; compact JSON, padded with spaces to a multiple of 8.
    ``metadata`` keeps the order given; with several keys the library's order is random.
    """
    if len({name for name, _, _ in tensors}) != len(tensors):
        raise ValueError("duplicate tensor name")
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    ends: list[int] = [0]
    order = sorted(tensors, key=lambda tensor: (-_RANK[tensor[1]], tensor[0].encode()))
    for name, dtype, shape in order:
        bits = prod(shape) * DTYPE_BITS[dtype]
        if bits % 8:
            raise ValueError(f"{name}: does not end on a byte boundary")
        ends.append(ends[-1] + bits // 8)
        header[name] = {"dtype": dtype, "shape": [int(dim) for dim in shape], "data_offsets": ends[-2:]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + begin for (name, _, _), begin in zip(order, ends, strict=False)}
    return len(text).to_bytes(8, "little") + text, offsets, start + ends[-1]
