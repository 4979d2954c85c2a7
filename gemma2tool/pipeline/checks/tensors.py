"""Values that no trained model has: NaN, tensors and rows of zeros, equal rows, equal matrices, flipped bits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from gemma2tool.model.names import EMBEDDING, HEAD
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.pipeline.checks.catalog import finding
from gemma2tool.pipeline.checks.finding import CheckFinding
from gemma2tool.pipeline.checks.names import enumerated, pattern
from gemma2tool.pipeline.checks.statistics import ZERO_RUN, TensorStatistics

OUTLIER = 1e4
"""A value this many times the RMS of the others is a flipped bit. The largest weights of trained models, the few that a
model breaks without, are about a thousand times the RMS."""

SHORTEST_ROW = 32
"""Shorter rows are equal by chance in coarse types."""

DUPLICATE_SHARE = 0.01
"""Equal rows of a projection below this share can be neurons that a merge or a pruning made."""

EMBEDDING_SHARE = 0.1
"""The same for the embedding, where tokens that never occur in training can have equal rows."""


class TensorCheck:
    """Call ``add`` with the statistics of every tensor; then read ``findings``."""

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self.specs = specs
        self.lines: dict[str, list[tuple[str, str]]] = defaultdict(list)
        self.digests: dict[tuple[tuple[int, ...], int], list[str]] = defaultdict(list)

    def add(self, name: str, tensor: TensorStatistics) -> None:
        spec = self.specs[name]
        if tensor.nonfinite:
            first = f"the first at {list(tensor.first_nonfinite)}"
            self._found("tensor.nonfinite", name, f"{tensor.nonfinite:,} values are NaN or infinite, {first}")
        if len(tensor.shape) < 2:
            return
        if tensor.size > 1 and tensor.zeros == tensor.size:
            self._found("tensor.zero", name, "all values are zero")
            return
        if tensor.is_constant:
            self._found("tensor.constant", name, f"all values are {tensor.maximum:g}")
            return
        self.digests[tensor.shape, tensor.digest].append(name)
        if tensor.largest > OUTLIER * tensor.rms_without_largest:
            self._found("tensor.outlier", name, f"the largest value is {tensor.largest:.3g}, the RMS of the others"
                        f" {tensor.rms_without_largest:.3g}")  # fmt: skip
        self._add_holes(name, tensor, spec)
        self._add_equal_rows(name, tensor, spec)

    def _add_holes(self, name: str, tensor: TensorStatistics, spec: TensorSpec) -> None:
        if tensor.hole is not None:
            self._found("tensor.hole", name, f"row {tensor.hole} has {ZERO_RUN} or more consecutive zeros")
        elif tensor.zero_rows and spec.role in ("attention", "mlp"):
            self._found("tensor.hole", name, f"{tensor.zero_rows:,} of {tensor.shape[0]:,} rows are zero")
        if tensor.constant_rows:
            self._found("tensor.constant-rows", name, f"{tensor.constant_rows:,} rows are one value, repeated")

    def _add_equal_rows(self, name: str, tensor: TensorStatistics, spec: TensorSpec) -> None:
        if tensor.shape[1] < SHORTEST_ROW or spec.role == "head":
            return
        keys = np.stack([tensor.row_hashes, tensor.row_squares.view(np.uint64)], axis=1)[tensor.row_squares > 0]
        repeated = len(keys) - len(np.unique(keys, axis=0)) - tensor.constant_rows
        share = EMBEDDING_SHARE if spec.role == "embedding" else DUPLICATE_SHARE
        if repeated > share * tensor.shape[0]:
            self._found("tensor.duplicate-rows", name, f"{repeated:,} of {tensor.shape[0]:,} rows repeat another row")

    def _found(self, id: str, name: str, message: str) -> None:
        self.lines[id].append((name, message))

    def findings(self) -> Iterator[CheckFinding]:
        """One finding for each id: the tensors that have it, with the first one's numbers."""
        for id, lines in self.lines.items():
            names = [name for name, _ in lines]
            first = "" if len(names) == 1 else f"{names[0]}: "
            yield finding(id, enumerated(names), f"{first}{lines[0][1]}")
        yield from self._equal_tensors()

    def _equal_tensors(self) -> Iterator[CheckFinding]:
        layers: set[int] = set()
        equal: list[str] = []
        head: list[str] = []
        for names in self.digests.values():
            if set(names) == {HEAD, EMBEDDING}:
                head = names
            elif len({pattern(name) for name in names}) > 1:
                equal += names
            elif len(names) > 1 and (layer := self.specs[names[1]].layer) is not None:
                layers.add(layer)
        if equal:
            yield finding("tensor.equal-kinds", enumerated(equal, 4), "matrices of these kinds have equal values")
        if head:
            yield finding("tensor.head-copied", HEAD, "it has the embedding's values, and the config does not tie them")
        if layers:
            shown = ", ".join(map(str, sorted(layers)[:8])) + ("..." if len(layers) > 8 else "")
            yield finding("tensor.equal-layers", "layers", f"matrices of {shown} equal those of an earlier layer")
