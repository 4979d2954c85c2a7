"""What the witness is asked about a checkpoint, and its answer compared with gemma2tool's own reading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma2tool.containers import gguf, safetensors
from gemma2tool.engines.messages import Message
from gemma2tool.engines.readers.sample import sampled_ranges
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import BFLOAT16, DTYPE_NAMES, FLOAT16, Array, LazyTensor
from gemma2tool.quantizers.gguf_types import GGML_BLOCKS, GGUF_TYPES
from gemma2tool.storage.reading import open_for_reading

CONTAINERS = {"gguf": "gguf", "hf": "safetensors", "mlx": "safetensors"}
"""Formats with a library that reads them here -> their container."""

_MESSAGE_BYTES = 1 << 11
"""More than a message takes without its payload, but for long names."""
_TOLERANCES = {BFLOAT16: 2.0**-7, FLOAT16: 2.0**-10}
"""One unit in the last place: libraries round a product of two roundings in their own order."""
_FLOAT32_TOLERANCE = 1e-6
"""Of the largest value of the rows, for dequantized float32."""
_GGUF_NAMES = {row.id: row.name for row in GGUF_TYPES.values()}


@dataclass(frozen=True)
class Disagreement:
    """Something that the library reads otherwise; ``subject``: a canonical tensor, a stored one, or a file."""

    subject: str | None
    message: str


@dataclass(frozen=True)
class Reading:
    """What the libraries found.

    ``libraries``: "gguf 0.19.0", in the order in which they were used. ``entries``: tensors of the headers.
    ``tensors``, ``rows``: how many tensors were compared by value, and how many rows of them. ``stored``: tensors
    compared as they are stored. ``unable``: what could not be done, which says nothing about the file.
    ``import_seconds``, ``cpu_seconds``: processor time of the witness, for imports and for everything. ``own_seconds``:
    wall time of this process, waiting included.
    """

    libraries: tuple[str, ...] = ()
    entries: int = 0
    tensors: int = 0
    rows: int = 0
    stored: int = 0
    disagreements: tuple[Disagreement, ...] = ()
    unable: tuple[str, ...] = ()
    import_seconds: float = 0.0
    cpu_seconds: float = 0.0
    own_seconds: float = 0.0


@dataclass(frozen=True)
class _Entry:
    """A tensor in a file's header, by gemma2tool's parser. ``offset`` and ``row_bytes``: where its rows are."""

    file: str
    shape: tuple[int, ...]
    type: str
    offset: int
    row_bytes: int


class Question:
    """What the witness is asked about a checkpoint of a format in ``CONTAINERS``, and what its answer means.

    ``own_names``: the files should have every tensor under the name that the library looks for, as gemma2tool's outputs
    do.
    """

    def __init__(self, checkpoint: Checkpoint, *, own_names: bool = False) -> None:
        self.checkpoint, self.own_names = checkpoint, own_names
        container = CONTAINERS[checkpoint.format]
        files = [file for file in checkpoint.files if container == "gguf" or file.suffix == ".safetensors"]
        self.entries = _entries(files, container)
        self.ranges = {
            name: sampled_ranges(name, tensor.shape) for name, tensor in checkpoint.tensors.items() if tensor.shape
        }
        self.raw = _stored_only(self.entries, checkpoint) if container == "safetensors" else {}
        self.request = {
            "container": container,
            "files": [str(file) for file in files],
            "layers": checkpoint.config.num_hidden_layers,
            "tensors": {name: (list(checkpoint.tensors[name].shape), ranges) for name, ranges in self.ranges.items()},
            "raw": self.raw,
        }

    @property
    def answer_bytes(self) -> int:
        """More than a full answer takes."""
        rows = sum(
            (last - first) * self.checkpoint.tensors[name].row_size * 4
            for name, ranges in self.ranges.items()
            for first, last in ranges
        )
        stored = sum(
            (last - first) * self.entries[name].row_bytes for name, ranges in self.raw.items() for first, last in ranges
        )
        count = len(self.entries) + sum(len(ranges) for part in (self.ranges, self.raw) for ranges in part.values())
        names = sum(len(name) + len(entry.file) for name, entry in self.entries.items())
        return rows + stored + 8 * names + count * _MESSAGE_BYTES + (1 << 20)

    def reading(self, messages: Sequence[Message], problem: str | None = None) -> Reading:
        """The answer, compared with gemma2tool's own reading. ``problem``: why it is not complete."""
        by_kind: dict[str, list[Message]] = {}
        for message in messages:
            by_kind.setdefault(str(message.content.get("kind")), []).append(message)
        libraries = [message.content for message in by_kind.get("library", ())]
        unable = [str(message.content["message"]) for message in by_kind.get("unable", ())]
        if problem is not None:
            last = f"{libraries[-1]['name']} {libraries[-1]['version']}" if libraries else "the reading process"
            unable.append(f"{last} {problem}")
        entries, values, stored = (by_kind.get(kind, []) for kind in ("entry", "values", "raw"))
        disagreements = [*self._refusals(by_kind, libraries), *self._wrong_shapes(by_kind)]
        if by_kind.get("listed"):
            disagreements += self._wrong_entries(entries)
        for message in values:
            disagreements += self._wrong_values(message)
        for message in stored:
            disagreements += self._wrong_bytes(message)
        return Reading(
            libraries=tuple(f"{library['name']} {library['version']}" for library in libraries),
            entries=len(entries),
            tensors=len({message.content["name"] for message in values}),
            rows=sum(message.content["last"] - message.content["first"] for message in values),
            stored=len({message.content["name"] for message in stored}),
            disagreements=tuple(disagreements),
            unable=tuple(unable),
            import_seconds=sum(library["seconds"] for library in libraries),
            cpu_seconds=sum(message.content["cpu_seconds"] for message in by_kind.get("time", ())),
        )

    def _refusals(
        self, by_kind: Mapping[str, Sequence[Message]], libraries: Sequence[Mapping[str, Any]]
    ) -> Iterator[Disagreement]:
        for message in by_kind.get("refused", ()):
            library = libraries[-1]
            yield Disagreement(
                None, f"{library['name']} {library['version']} does not accept it: {message.content['message']}"
            )
        for message in by_kind.get("absent", ()) if self.own_names else ():
            name, stored = message.content["name"], message.content["stored"]
            place = "the file has no tensor of that name" if name == stored else f"the file has no {stored}"
            yield Disagreement(name, place)

    def _wrong_shapes(self, by_kind: Mapping[str, Sequence[Message]]) -> Iterator[Disagreement]:
        for message in by_kind.get("shape", ()):
            name, shape = message.content["name"], tuple(message.content["shape"])
            own = tuple(self.checkpoint.tensors[name].shape)
            transposed = ": transposed" if shape == own[::-1] else ""
            sentence = f"has shape {shape} in the file ({message.content['stored']}), {own} as read by gemma2tool"
            yield Disagreement(name, sentence + transposed)

    def _wrong_entries(self, messages: Sequence[Message]) -> Iterator[Disagreement]:
        entries = {message.content["name"]: message.content for message in messages}
        for name in sorted(self.entries.keys() - entries.keys()):
            yield Disagreement(name, "the library does not list it")
        for name, content in entries.items():
            entry = self.entries.get(name)
            if entry is None:
                yield Disagreement(name, "the library lists it, gemma2tool does not")
                continue
            shape = tuple(content["shape"])
            if (content["type"], shape) != (entry.type, entry.shape):
                own = f"{entry.type} of shape {entry.shape}"
                yield Disagreement(name, f"is {content['type']} of shape {shape} for the library, {own} for gemma2tool")
            elif content.get("offset", entry.offset) != entry.offset:
                offsets = f"at byte {content['offset']} for the library, {entry.offset} for gemma2tool"
                yield Disagreement(name, f"begins {offsets}")

    def _wrong_values(self, message: Message) -> Iterator[Disagreement]:
        """At most one; the values of a library against gemma2tool's of the same rows."""
        name, first, last = (message.content[key] for key in ("name", "first", "last"))
        tensor = self.checkpoint.tensors[name]
        own = tensor.load_rows_f32(first, last)
        if len(message.payload) != own.nbytes:
            yield Disagreement(name, f"rows {first} to {last - 1} have {len(message.payload)} bytes for the library")
            return
        read = np.frombuffer(message.payload, np.float32).reshape(own.shape)
        differing = _differing(tensor, own, read)
        if count := int(np.count_nonzero(differing)):
            with np.errstate(invalid="ignore", over="ignore"):
                largest = float(np.nanmax(np.abs(own - read)[differing]))
            rows = f"row {first}" if last == first + 1 else f"rows {first} to {last - 1}"
            yield Disagreement(
                name,
                f"{count} of {own.size} values of {rows} are others as the library reads {message.content['stored']}"
                f" (largest difference {largest:.3g})",
            )

    def _wrong_bytes(self, message: Message) -> Iterator[Disagreement]:
        name, first, last = (message.content[key] for key in ("name", "first", "last"))
        entry = self.entries[name]
        with open_for_reading(Path(entry.file)) as reader:
            own = reader.pread(entry.offset + first * entry.row_bytes, (last - first) * entry.row_bytes)
        if bytes(own) != message.payload:
            yield Disagreement(name, f"rows {first} to {last - 1} have other bytes as the library reads them")


def _differing(tensor: LazyTensor, own: Array, read: Array) -> Array:
    """Where the values are not the same, to rounding where they are computed."""
    with np.errstate(invalid="ignore"):
        same = (own == read) | (np.isnan(own) & np.isnan(read))
        if tensor.stored not in DTYPE_NAMES.values():
            relative = _TOLERANCES.get(tensor.dtype, 0.0)
            largest = np.abs(own[np.isfinite(own)]).max(initial=0.0)
            same |= np.abs(own - read) <= relative * np.abs(own) + _FLOAT32_TOLERANCE * largest
    return np.asarray(~same)


def _entries(files: Sequence[Path], container: str) -> dict[str, _Entry]:
    entries = {}
    for file in files:
        if container == "gguf":
            for name, info in gguf.read_header(file, GGML_BLOCKS).tensors.items():
                shape = tuple(reversed(info.dims))
                entries[name] = _Entry(
                    str(file), shape, _GGUF_NAMES.get(info.type_id, str(info.type_id)), info.offset, 0
                )
        else:
            for name, stored in safetensors.read_header(file).tensors.items():
                rows = stored.shape[0] if stored.shape else 1
                row_bytes = stored.nbytes // rows if rows else 0
                entries[name] = _Entry(str(file), stored.shape, stored.dtype, stored.offset, row_bytes)
    return entries


def _stored_only(entries: Mapping[str, _Entry], checkpoint: Checkpoint) -> dict[str, list[tuple[int, int]]]:
    """The stored tensors that are not a canonical tensor by themselves, with the ranges of rows to compare."""
    return {
        name: sampled_ranges(name, entry.shape)
        for name, entry in entries.items()
        if name not in checkpoint.tensors or checkpoint.tensors[name].stored not in DTYPE_NAMES.values()
    }
