"""The file that a shard writes: what it computed, and what must be equal in all parts of one result.

A safetensors file whose metadata is one JSON document. Parts are merged only if they are of one kind and one number of
shards, each shard is there once, and their settings are equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma2tool.containers import safetensors, strict_json
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.pipeline.sharding.shard import MAX_COUNT, Shard
from gemma2tool.storage.reading import open_for_reading
from gemma2tool.storage.staging.journal import Fingerprint
from gemma2tool.storage.staging.staged_output import Staging
from gemma2tool.version import __version__

SCHEMA = "gemma2tool.part/1"
_KEY = "part"
_DTYPES = {"F64": "<f8", "F32": "<f4"}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Part:
    """The part of a result that ``shard`` computed.

    ``kind``: the command. ``settings``: what decides the result, by the name in messages. ``content``: a JSON value.
    ``arrays``: float64 or float32, by name; those of a file are read when they are asked for.
    """

    kind: str
    shard: Shard
    settings: Fingerprint
    content: Any
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, str]:
        """As the file's metadata have it."""
        document = {
            "schema": SCHEMA,
            "kind": self.kind,
            "shard": [self.shard.index, self.shard.count],
            "settings": dict(self.settings),
            "content": self.content,
        }
        return {_KEY: json.dumps(document, separators=(",", ":"))}


def settings_of(settings: Fingerprint) -> Fingerprint:
    """``settings`` of this version: another may compute other bits."""
    return {"tool": f"gemma2tool {__version__}", **settings}


def write_part(part: Part, path: Path, *, force: bool) -> None:
    """Write the part; the file is complete or not there."""
    arrays = [(name, _NAMES[values.dtype.str], values.shape) for name, values in part.arrays.items()]
    header, offsets, size = safetensors.layout(arrays, part.metadata)
    with Staging(path, force=force, expected_bytes=size) as staging:
        file = staging.file(path.name, size)
        file.pwrite(0, header)
        for name, values in part.arrays.items():
            if values.size:
                file.pwrite(offsets[name], np.ascontiguousarray(values))
        staging.commit()


def read_part(path: Path) -> Part:
    """Raises ``InputRefused`` (``part.damaged``) for anything but a whole part."""
    try:
        header = safetensors.read_header(path)
        document = strict_json.load(header.metadata[_KEY].encode(), what="part", max_bytes=safetensors.MAX_HEADER_BYTES)
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {str(document['schema'])[:40]!r} is not {SCHEMA!r}")
        index, count = (_integer(value) for value in document["shard"])
        if not 0 <= index < count <= MAX_COUNT:
            raise ValueError(f"shard {index} of {count}")
        settings = {str(name): str(value) for name, value in document["settings"].items()}
        part = Part(str(document["kind"]), Shard(index, count), settings, document["content"], _Stored(path, header))
    except InputRefused as error:
        if not error.id.startswith(("safetensors.", "json.", "file.other-container")):
            raise
        raise InputRefused("part.damaged", f"{path}: not a part that a shard wrote: {error.message}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputRefused("part.damaged", f"{path}: not a part that a shard wrote: {error}") from None
    return part


class _Stored(Mapping[str, NDArray[Any]]):
    """The arrays of a file, of which there may be more than fit into memory."""

    def __init__(self, path: Path, header: safetensors.SafetensorsHeader) -> None:
        self.path, self.tensors = path, header.tensors
        for name, entry in self.tensors.items():
            if entry.dtype not in _DTYPES:
                raise ValueError(f"{name[:40]!r} is {entry.dtype}")

    def __getitem__(self, name: str) -> NDArray[Any]:
        entry = self.tensors[name]
        values = np.empty(entry.shape, _DTYPES[entry.dtype])
        if entry.nbytes:
            with open_for_reading(self.path) as reader:
                reader.pread_into(entry.offset, values)
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{str(value)[:40]!r} is not an integer")
    return value


def read_parts(paths: Sequence[Path]) -> list[Part]:
    """The parts of one result, one or more, in the order of their shards.

    Raises ``UsageError`` (``part.mismatch``, ``part.twice``, ``part.missing``) if they do not make up one.
    """
    first, *others = ((path, read_part(path)) for path in paths)
    by_shard = {first[1].shard.index: first}
    for path, part in others:
        _check_mates(*first, path, part)
        earlier = by_shard.setdefault(part.shard.index, (path, part))
        if earlier[0] is not path:
            raise UsageError("part.twice", f"{path}: shard {part.shard}, as {earlier[0]}")
    count = first[1].shard.count
    missing = [f"{index}/{count}" for index in range(count) if index not in by_shard]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        verb = "is" if len(missing) == 1 else "are"
        raise UsageError("part.missing", f"shard {', '.join(missing[:4])}{more} {verb} missing")
    return [by_shard[index][1] for index in range(count)]


def _check_mates(first_path: Path, first: Part, path: Path, part: Part) -> None:
    """Raises ``UsageError`` (``part.mismatch``) for parts of different results."""
    sides = [
        {"command": side.kind, **side.settings, "number of shards": str(side.shard.count)} for side in (first, part)
    ]
    for name in {**sides[0], **sides[1]}:
        a, b = (side.get(name, "absent") for side in sides)
        if a != b:
            raise UsageError("part.mismatch", f"{path}: {name} is {b}, and {a} in {first_path}")
