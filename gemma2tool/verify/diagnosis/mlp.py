"""Mistakes in the feed-forward projections: gate and up fused in one order of rows and split in another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gemma2tool.model.lazy import Array, LazyTensor, StackedRows
from gemma2tool.verify.diagnosis.names import place
from gemma2tool.verify.diagnosis.signature import Signature, Transform, Weights
from gemma2tool.verify.diagnosis.views import Rows

GATING = ("gate_proj", "up_proj")


def _split_after(order: Callable[[int], Array]) -> Transform:
    """gate and up fused and split in different orders. ``order``: for F rows each, the fused row that each of 2F rows
    holds."""

    def transform(weights: Weights, name: str) -> LazyTensor | None:
        parts = weights.siblings(name, GATING)
        if parts is None or any(part.dtype != parts[0].dtype for part in parts):
            return None
        size = parts[0].rows
        first = size * GATING.index(place(name).kind)
        return Rows(StackedRows(parts), order(size)[first : first + size])

    return transform


def alternating(size: int) -> Array:
    """Rows of [gate; up] in the order gate 0, up 0, gate 1, up 1, ..."""
    return np.arange(2 * size).reshape(2, size).T.reshape(-1)


SIGNATURES = (
    Signature(
        "mlp.missplit",
        GATING,
        "{what} {have} each other's rows: they were fused row by row (gate, up, gate, up) and split as if all of "
        "gate came first",
        _split_after(alternating),
    ),
    Signature(
        "mlp.missplit",
        GATING,
        "{what} {have} each other's rows: they were fused with all of gate first and split row by row (gate, up, "
        "gate, up)",
        _split_after(lambda size: np.argsort(alternating(size))),
    ),
)
