"""The metadata of zarr 2 (``.zarray``) and zarr 3 (``zarr.json``) arrays, limited to what Orbax writes by default.

Chunks are little-endian floats, or codes of 4 or 8 bits, in C order, uncompressed or one zstandard frame each. With
zarr 3, Orbax (0.5.3 to 0.12) makes each chunk a shard of a single chunk, which an index at the end of the shard
locates.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.model.lazy import BFLOAT16, FLOAT16, FLOAT32, DType
from gemma2tool.storage.crc import crc32c
from gemma2tool.storage.quoting import quoted

ZARR2, ZARR3 = ".zarray", "zarr.json"
MAX_DIMS = 8
INDEX_BYTES = 20
"""Size of a shard's index: offset and size of the only chunk in 64 bits each, and the CRC-32C of both."""

_DTYPES = {
    "<f4": FLOAT32,
    "<f2": FLOAT16,
    "<f8": np.dtype(np.float64),
    "bfloat16": BFLOAT16,
    "|i1": np.dtype(np.int8),
    "int4": np.dtype(ml_dtypes.int4),  # a byte for each value
}
_ZARR3_FIELDS = frozenset(
    ("zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs",
     "attributes", "storage_transformers", "dimension_names")
)  # fmt: skip
_ZARR3_DTYPES = {"float32": "<f4", "float16": "<f2", "float64": "<f8", "int8": "|i1"}
"""The names that differ."""


@dataclass(frozen=True)
class ArrayMetadata:
    """``shape`` and ``chunks`` have one length. ``is_compressed``: whether each chunk is a zstandard frame.
    ``missing_is_zero``: whether a chunk that is not stored stands for zeros.
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: DType
    is_zarr3: bool = False
    is_compressed: bool = False
    missing_is_zero: bool = False

    @property
    def grid(self) -> list[range]:
        """The places of the chunks along each axis."""
        return [range(-(-dim // chunk)) for dim, chunk in zip(self.shape, self.chunks, strict=True)]

    def chunk_key(self, place: Sequence[int]) -> str:
        """The key of a chunk after the array's name, by its place in the grid of chunks."""
        return f"c/{'/'.join(map(str, place))}" if self.is_zarr3 else ".".join(map(str, place))


def refused(kind: str, message: str) -> InputRefused:
    return InputRefused(f"orbax.{kind}", message)


def parse_zarr2(content: object, origin: str) -> ArrayMetadata:
    """The metadata in a ``.zarray``. Raises ``InputRefused`` for anything that Orbax does not write."""
    if not isinstance(content, dict) or content.get("zarr_format") != 2:
        raise refused("metadata", f"{origin} is not a zarr array")
    for name, expected in (("order", "C"), ("filters", None), ("fill_value", None), ("dimension_separator", ".")):
        if content.get(name, expected) != expected:
            raise refused("metadata", f"{origin} has the {name} {quoted(content[name])}, which Orbax does not write")
    compressor = content.get("compressor")
    if compressor is not None and (not isinstance(compressor, dict) or compressor.get("id") != "zstd"):
        raise refused("compressor", f"{origin} is compressed with {quoted(compressor)}; only zstd is read")
    shape, chunks = _sizes(content.get("shape"), content.get("chunks"), origin)
    return ArrayMetadata(shape, chunks, _dtype(content.get("dtype"), origin), is_compressed=compressor is not None)


def parse_zarr3(content: object, origin: str, *, stores_zeros: bool) -> ArrayMetadata:
    """The metadata in a ``zarr.json``. ``stores_zeros``: whether chunks of zeros are stored too, so that none may be
    missing. Raises ``InputRefused`` for anything that Orbax does not write.
    """
    if not isinstance(content, dict) or content.get("zarr_format") != 3 or content.get("node_type") != "array":
        raise refused("metadata", f"{origin} is not a zarr array")
    if unknown := [name for name, value in content.items() if name not in _ZARR3_FIELDS and not _is_optional(value)]:
        raise refused("metadata", f"{origin} has the field {quoted(unknown[0])}, which a reader must understand")
    grid, grid_options = _named(content.get("chunk_grid"), origin)
    keys, key_options = _named(content.get("chunk_key_encoding"), origin)
    if (grid, keys, key_options.get("separator", "/")) != ("regular", "default", "/"):
        raise refused(
            "metadata", f"{origin} has a {quoted(grid)} grid with {quoted(keys)} keys, which Orbax does not write"
        )
    if content.get("storage_transformers") or content.get("fill_value") != 0:
        raise refused("metadata", f"{origin} has storage transformers or a fill value, which Orbax does not write")
    shape, chunks = _sizes(content.get("shape"), grid_options.get("chunk_shape"), origin)
    codecs = _codecs(content.get("codecs"), origin)
    shard = codecs.get("sharding_indexed", {}) if len(codecs) == 1 else {}
    index = (list(_codecs(shard.get("index_codecs"), origin)), shard.get("index_location", "end"))
    if shard.get("chunk_shape") != list(chunks) or index != (["bytes", "crc32c"], "end"):
        raise refused(
            "compressor", f"{origin} is not stored as shards of one chunk, with their index at the end, as Orbax does"
        )
    codecs = _codecs(shard.get("codecs"), origin)
    if list(codecs) not in (["bytes"], ["bytes", "zstd"]) or codecs["bytes"].get("endian") != "little":
        raise refused(
            "compressor", f"{origin} has the codecs {quoted(list(codecs))}; little-endian bytes and zstd are read"
        )
    dtype = _dtype(_ZARR3_DTYPES.get(str(content.get("data_type")), content.get("data_type")), origin)
    return ArrayMetadata(shape, chunks, dtype, True, "zstd" in codecs, not stores_zeros)


def _is_optional(field: object) -> bool:
    """Whether a field that zarr 3 does not define says that readers may ignore it."""
    return isinstance(field, dict) and field.get("must_understand") is False


def chunk_in_shard(index: bytes, shard_bytes: int, origin: str) -> tuple[int, int]:
    """Offset and size of the only chunk in a shard, from the last ``INDEX_BYTES`` of the shard."""
    offset, nbytes, checksum = struct.unpack("<QQI", index)
    if crc32c(index[:-4]) != checksum or offset + nbytes > shard_bytes - INDEX_BYTES:
        raise refused("broken", f"{origin} has a shard with a damaged index")
    return offset, nbytes


def _sizes(shape: object, chunks: object, origin: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if (
        not (_are_sizes(shape) and _are_sizes(chunks))
        or not 0 < len(shape) == len(chunks) <= MAX_DIMS
        or any(chunk > dim for chunk, dim in zip(chunks, shape, strict=True))
        or prod(shape) >= 1 << 40
    ):
        raise refused("shape", f"{origin} has the shape {quoted(shape)} in chunks of {quoted(chunks)}")
    return tuple(shape), tuple(chunks)


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 < value < 1 << 40 for value in values)


def _dtype(name: object, origin: str) -> DType:
    if not isinstance(name, str) or name not in _DTYPES:
        raise refused("dtype", f"{origin} holds {quoted(name)}, neither floating-point values nor codes of 4 or 8 bits")
    dtype: DType = _DTYPES[name]
    return dtype


def _codecs(items: object, origin: str) -> dict[str, Mapping[str, Any]]:
    """The options of each codec, by name, in order."""
    return dict(_named(item, origin) for item in items) if isinstance(items, list) else {}


def _named(item: object, origin: str) -> tuple[str, Mapping[str, Any]]:
    """The name and the options of one of zarr 3's extension points."""
    name, options = (item.get("name"), item.get("configuration", {})) if isinstance(item, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(options, dict):
        raise refused("metadata", f"{origin} has a grid, keys or codecs without a name")
    return name, options
