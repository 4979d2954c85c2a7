"""zarr 3's metadata, which Orbax writes where it is asked to (``use_zarr3``), said in the terms of zarr 2.

Orbax makes each chunk a shard of one inner chunk, which zstandard compressed, and an index that says where it lies. Found there, it is
what zarr 2 stores as a chunk. Other codecs are left to tensorstore.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from gemma2tool.storage.crc import crc32c
from gemma2tool.storage.quoting import quoted

METADATA = "zarr.json"
OTHER = "other"
"""The name of a compressor that only tensorstore reads."""
INDEX_BYTES = 20
"""At the end of a shard of one inner chunk: its offset and its bytes in 64 bits each, and the CRC-32C of both."""
CODECS = ("bytes", "zstd", "gzip", "blosc", "transpose", "crc32c", "sharding_indexed")
"""Those that tensorstore has."""
_INDEX_CODECS = ["bytes", "crc32c"]
_DTYPES = {"float32": "<f4", "float16": "<f2", "float64": "<f8", "bfloat16": "bfloat16"}


def as_zarr2(meta: object, *, stores_all: bool) -> dict[str, object]:
    """What ``.zarray`` would say, ``prefix`` of the chunks' keys and ``sharded``, whether an ``inner_chunk`` is to be found in each
    chunk. ValueError, with what, for metadata that cannot be.

    ``stores_all``: whether chunks of the fill value were stored too, so that one that is missing has been lost.
    """
    if not isinstance(meta, dict) or meta.get("zarr_format") != 3 or meta.get("node_type") != "array":
        raise ValueError("is no zarr array")
    grid, keys = _named(meta.get("chunk_grid")), _named(meta.get("chunk_key_encoding"))
    if grid[0] != "regular" or keys[0] not in ("default", "v2"):
        raise ValueError(f"has chunks in a grid of the kind {quoted(grid[0])} with keys of the kind {quoted(keys[0])}")
    if meta.get("storage_transformers"):
        raise ValueError("has storage transformers")
    chunks = grid[1].get("chunk_shape")
    kind, sharded = _compressor(meta.get("codecs"), chunks)
    return {
        "zarr_format": 2,
        "shape": meta.get("shape"),
        "chunks": chunks,
        "dtype": _DTYPES.get(str(meta.get("data_type")), meta.get("data_type")),
        "compressor": kind and {"id": kind},
        "order": "C",
        "fill_value": None if stores_all else meta.get("fill_value"),
        "filters": None,
        "dimension_separator": keys[1].get("separator", "/" if keys[0] == "default" else "."),
        "prefix": "c/" if keys[0] == "default" else "",
        "sharded": sharded,
    }


def inner_chunk(index: bytes, shard_bytes: int) -> tuple[int, int]:
    """Offset and size of the inner chunk, by the last ``INDEX_BYTES`` of a shard. ValueError for an index that cannot be."""
    offset, nbytes, checksum = struct.unpack("<QQI", index)
    if crc32c(index[:-4]) != checksum or offset + nbytes > shard_bytes - INDEX_BYTES:
        raise ValueError("has a shard with a damaged index")
    return offset, nbytes


def _compressor(codecs: object, chunks: object) -> tuple[str | None, bool]:
    """What the chunks' bytes are compressed with, as zarr 2 names it, and whether they lie inside a shard each."""
    steps = _codecs(codecs)
    sharded = [name for name, _ in steps] == ["sharding_indexed"]
    if sharded:
        shard = steps[0][1]
        index = [name for name, _ in _codecs(shard.get("index_codecs"))]
        if shard.get("chunk_shape") != chunks or shard.get("index_location", "end") != "end" or index != _INDEX_CODECS:
            return OTHER, False
        steps = _codecs(shard.get("codecs"))
    if not steps or steps[0][0] != "bytes" or steps[0][1].get("endian", "little") != "little":
        return OTHER, False
    names = [name for name, _ in steps[1:]]
    return (None, sharded) if not names else ("zstd", sharded) if names == ["zstd"] else (OTHER, False)


def _codecs(items: object) -> list[tuple[str, Mapping[str, object]]]:
    found = [_named(item) for item in items] if isinstance(items, list) else []
    for name, _ in found:
        if name not in CODECS:
            raise ValueError(f"is packed with {quoted(name)}, which is not read")
    return found


def _named(item: object) -> tuple[str, Mapping[str, object]]:
    """The name and the configuration of one of zarr 3's extension points."""
    if isinstance(item, str):
        return item, {}
    name, configuration = (item.get("name"), item.get("configuration", {})) if isinstance(item, dict) else (None, None)
    if isinstance(name, str) and isinstance(configuration, dict):
        return name, configuration
    raise ValueError("has a grid, keys or codecs without a name")
