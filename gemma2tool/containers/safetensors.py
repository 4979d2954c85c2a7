"""The safetensors container: 8 bytes of header length, a JSON header, then the tensors' bytes without a gap.

Rules: the format's README and the validation of the safetensors crate 0.8 (``tensor.rs``), each of whose error kinds is refused
here too; beyond it, duplicate keys, unknown fields and more than ``MAX_TENSORS`` tensors are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import open_for_reading

MAX_HEADER_BYTES = 16 << 20  # the library allows 100 MB; 20,000 tensors need about 3
MAX_TENSORS = 20_000
MAX_DIMS = 8
MAX_NAME_BYTES = 1 << 16

# Bits an element, in the order of the crate's Dtype enum, by which its writer sorts.
DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_BITS)}
_FIELDS = {"dtype", "shape", "data_offsets"}
_HINT = "the file is damaged or was not written by safetensors; download it again"
_HEADER_ERRORS = {
    "json.utf8": "safetensors.invalid-header",
    "json.duplicate-key": "safetensors.duplicate-key",
    "json.too-many-values": "safetensors.too-many-tensors",
}
"""The id of a header that is not accepted as JSON, by the JSON error's id."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: ``offset`` is absolute in the file; ``dtype`` is spelled as in the header (BF16, F32, I8, ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """All that a safetensors file says before its data. ``tensors`` is in the order of the header."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, TensorEntry] = field(repr=False)
    data_start: int
    file_size: int


def read_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """The header of a safetensors file, checked against the file's size. Raises InputRefused (``safetensors.*``)."""
    path = Path(path)
    with open_for_reading(path) as reader:
        if reader.size < 8:
            raise _refusal("header-too-small", path, f"{reader.size} bytes are too few for a header")
        length = int.from_bytes(reader.pread(0, 8), "little")
        if length > MAX_HEADER_BYTES:
            raise _refusal(
                "header-too-large", path, f"says its header has {length} bytes; at most {MAX_HEADER_BYTES} are accepted"
            )
        if 8 + length > reader.size:
            raise _refusal(
                "invalid-header-length", path, f"says its header has {length} bytes, but has {reader.size} bytes in all"
            )
        raw = bytes(reader.pread(8, length))
        size = reader.size
    if not raw.startswith(b"{"):
        raise _refusal("invalid-header-start", path, "its header does not begin with {")
    header = _parse(raw, path)
    metadata = _metadata(header.pop("__metadata__", {}), path)
    if len(header) > MAX_TENSORS:
        raise _refusal("too-many-tensors", path, f"holds {len(header)} tensors; at most {MAX_TENSORS} are accepted")
    start = 8 + length
    tensors = {name: _entry(name, info, start, path) for name, info in header.items()}
    _check_coverage(tensors, start, size, path)
    return SafetensorsHeader(path, metadata, tensors, start, size)


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        return strict_json.load(
            raw, what=f"{path}: header", max_bytes=MAX_HEADER_BYTES, max_depth=3, max_values=25 * MAX_TENSORS
        )
    except InputRefused as error:
        raise InputRefused(
            _HEADER_ERRORS.get(error.id, "safetensors.invalid-header-json"), error.message, hint=_HINT
        ) from error


def _metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _refusal("metadata", path, "__metadata__ is not a map of text to text")
    return value


def _entry(name: str, info: object, start: int, path: Path) -> TensorEntry:
    where = f"tensor {quoted(name)}"
    if len(name) > MAX_NAME_BYTES:
        raise _refusal("name-too-long", path, f"{where} has a name of {len(name)} characters")
    if not isinstance(info, dict) or info.keys() != _FIELDS:
        raise _refusal("tensor-fields", path, f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _refusal("dtype", path, f"{where} has the unknown dtype {quoted(dtype)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise _refusal("shape", path, f"{where} has the shape {quoted(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _refusal("invalid-offset", path, f"{where} has the data_offsets {quoted(offsets)}")
    # A dimension of 0 must not hide others whose product overflows.
    bits = prod(dim for dim in shape if dim) * DTYPE_BITS[dtype]
    if bits >= 1 << 63:
        raise _refusal("validation-overflow", path, f"{where}: the product of its shape {quoted(shape)} overflows")
    bits = bits if 0 not in shape else 0
    if bits % 8:
        raise _refusal("misaligned-slice", path, f"{where} ends within a byte")
    begin, end = offsets
    if end - begin != bits // 8:
        raise _refusal(
            "tensor-invalid-info",
            path,
            f"{where}: {dtype} {tuple(shape)} takes {bits // 8} bytes, data_offsets give {end - begin}",
        )
    return TensorEntry(name, dtype, tuple(shape), start + begin, end - begin)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_coverage(tensors: Mapping[str, TensorEntry], start: int, size: int, path: Path) -> None:
    """The tensors, sorted by offset, must follow each other without gap or overlap and end with the file."""
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
        raise _refusal("truncated", path, f"has {size} bytes, its tensors end at byte {end}")
    if size > end:
        raise _refusal("trailing-bytes", path, f"{size - end} bytes follow its last tensor")


def _refusal(kind: str, path: Path, message: str) -> InputRefused:
    return InputRefused(f"safetensors.{kind}", f"{path}: {message}", hint=_HINT)


def layout(
    tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int], int]:
    """The bytes that come before the data of (name, dtype, shape) ``tensors``, each tensor's absolute offset, and the file's size.

    Equal to what ``safetensors.serialize`` 0.8.0 writes: tensors sorted by dtype, widest first, then by name in byte order; compact
    JSON; padded with spaces to a multiple of 8. ``metadata`` keeps the order given (the library's order of several keys is random).
    """
    if len({name for name, _, _ in tensors}) != len(tensors):
        raise ValueError("duplicate tensor name")
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    ends: list[int] = [0]
    order = sorted(tensors, key=lambda tensor: (-_RANK[tensor[1]], tensor[0].encode()))
    for name, dtype, shape in order:
        bits = prod(shape) * DTYPE_BITS[dtype]
        if bits % 8:
            raise ValueError(f"{name}: ends within a byte")
        ends.append(ends[-1] + bits // 8)
        header[name] = {"dtype": dtype, "shape": [int(dim) for dim in shape], "data_offsets": ends[-2:]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + begin for (name, _, _), begin in zip(order, ends, strict=False)}
    return len(text).to_bytes(8, "little") + text, offsets, start + ends[-1]
