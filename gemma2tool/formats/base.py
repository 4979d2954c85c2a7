"""What a format is, and what it hands to the pipeline when it writes.

Reading: ``open(path)`` returns a canonical ``Checkpoint``; it looks at headers only. Writing: ``layout(checkpoint,
options)`` returns an ``Output``: every file with its exact size, every tensor with the place of each of its bytes and
with the encoder of its rows. The pipeline then moves the bytes. A format never writes a file itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import FormatFacts
from gemma2tool.model.lazy import Array, LazyTensor
from gemma2tool.quantizers.base import Encoder


@dataclass(frozen=True)
class Placement:
    """Where the bytes of one part go: ``file`` (name inside the output), absolute ``offset``, ``nbytes``."""

    name: str
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write: rows of ``source`` go through ``encoder`` to the places in ``parts``, by the part's suffix.

    ``canonical``: the canonical tensors that it carries; several where the format fuses them.
    """

    name: str
    canonical: tuple[str, ...]
    source: LazyTensor
    encoder: Encoder
    parts: Mapping[str, Placement]


@dataclass(frozen=True)
class OutputFile:
    """A file with tensors: its final ``size``, and the ``fixed`` byte strings known in advance (headers), as (offset,
    bytes).

    ``finish``, where a container has checksums of its data (zip), receives the CRC-32 of every part by name and returns
    further byte strings to write.
    """

    name: str
    size: int
    fixed: Sequence[tuple[int, bytes]]
    finish: Callable[[Mapping[str, int]], Sequence[tuple[int, bytes]]] | None = None


@dataclass(frozen=True)
class Output:
    """Everything that will be written.

    ``single_file``: the output is a file (.gguf, .ckpt) rather than a folder. ``assets``: small files that are
    written whole. ``losses``: (canonical name, largest absolute loss) of tensors that the target's own conventions
    cannot hold exactly. ``warnings``: what the target cannot represent, and what its consumer assumes instead.
    """

    format: str
    single_file: bool
    files: list[OutputFile]
    tensors: list[OutputTensor]
    assets: dict[str, bytes] = field(default_factory=dict)
    losses: list[tuple[str, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Exact size of all files together."""
        return sum(file.size for file in self.files) + sum(len(data) for data in self.assets.values())


Closers = list[Callable[[], None]]
"""What closes the files that a reader has opened."""


@contextmanager
def opening() -> Iterator[Closers]:
    """Collects the closers of a checkpoint that is being opened, and calls them if that fails."""
    closers: Closers = []
    try:
        yield closers
    except BaseException:
        while closers:
            closers.pop()()
        raise


class Format(ABC):
    """How checkpoints of a format are recognized, read and written; ``gemma2tool.formats.registry`` finds it by name.

    ``facts``: what the format declares about itself. ``types``: the quantization types that it can be written in.
    """

    facts: ClassVar[FormatFacts]
    types: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        return self.facts.name

    @abstractmethod
    def detect(self, path: Path) -> bool:
        """Whether the files at ``path`` are of this format, by their content, not by the name alone. Never raises."""

    @abstractmethod
    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        """Read headers; return the canonical checkpoint, checked against the tensor table."""

    @abstractmethod
    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        """Plan the output. Reads no weights except those (norms) whose values decide how they can be stored."""

    def lacks_config(self, path: Path) -> bool:
        """Whether the checkpoint at ``path`` has no config of its own, so that one must be given or deduced."""
        folder = path if path.is_dir() else path.parent
        return not (folder / "config.json").is_file()

    def expected_after_roundtrip(self, source: Checkpoint, candidate: Checkpoint) -> dict[str, LazyTensor]:
        """The canonical tensors of ``source`` that this format's own conventions change, as they come back from
        ``candidate``, a file of this format (opened; its stored types count, its values do not).

        A verification compares the candidate with these instead of the source's: what they lose is not a mistake.
        """
        return {}


def as_bytes(array: Array) -> memoryview:
    """The bytes of a C-contiguous array, without a copy."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
