"""Writes a file of Hessians, or the part of a shard, one Hessian at a time; what an interrupted run wrote is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from gemma2tool.containers import safetensors
from gemma2tool.pipeline.calibration.collected import About
from gemma2tool.pipeline.sharding.pairwise import PairwiseSum, levels
from gemma2tool.pipeline.sharding.part import Part
from gemma2tool.storage.staging.staged_output import Staging

if TYPE_CHECKING:
    from gemma2tool.storage.staging.staged_file import StagedFile

OUTPUTS = ".outputs"
"""How the names end of what is summed over the sequences that are differentiated."""


class HessiansFile:
    """The layout of a file of Hessians, or of a shard's ``part`` of it.

    ``sizes``: values of each packed Hessian, by name. A part has the nodes of the sums of its slices, which ``spans``
    has for "inputs" and "outputs".
    """

    def __init__(
        self, sizes: Mapping[str, int], about: About, part: Part | None = None, spans: Mapping[str, range] | None = None
    ) -> None:
        self.sizes, self.is_part = sizes, part is not None
        shapes: dict[str, tuple[int, ...]] = {name: (size,) for name, size in sizes.items()}
        if spans is not None:
            shapes = {name: (node_count(spans[kind_of(name)]), size) for name, size in sizes.items()}
        self.header, self.offsets, self.nbytes = safetensors.layout(
            [(name, "F32", shape) for name, shape in shapes.items()], about.metadata if part is None else part.metadata
        )

    @contextmanager
    def writing(self, staging: Staging) -> Iterator[Writer]:
        """Writes what is missing in ``staging``, and commits it at the end of the context."""
        with staging:
            yield Writer(self, staging)
            staging.commit()


class Writer:
    """Puts sums in their places."""

    def __init__(self, file: HessiansFile, staging: Staging) -> None:
        self.layout, self.staging = file, staging
        self._file: StagedFile | None = None
        if not staging.finished:
            self._file = staging.file(staging.destination.name, file.nbytes)
            self._file.pwrite(0, file.header)
        self.missing = set() if staging.finished else file.sizes.keys() - staging.completed.keys()

    def write(self, name: str, sums: PairwiseSum) -> None:
        """Write what was summed of the Hessian ``name``, unless an earlier run did."""
        if name not in self.missing:
            return
        assert self._file is not None
        nodes = sums.nodes if self.layout.is_part else [sums.total()]
        offset = self.layout.offsets[name]
        for node in nodes:
            self._file.pwrite(offset, np.ascontiguousarray(node, "<f4"))
            offset += node.nbytes
        self.missing.discard(name)
        self.staging.complete(name, [self.staging.destination.name], None, sum(node.nbytes for node in nodes))


def kind_of(name: str) -> str:
    """Which slices a Hessian is summed over: "inputs" or "outputs"."""
    return "outputs" if name.endswith(OUTPUTS) else "inputs"


def node_count(span: range) -> int:
    """How many nodes the sums of these slices are kept as."""
    return len(levels(span.start, span.stop))
