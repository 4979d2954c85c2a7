"""Mistakes in the feed-forward projections: gate and up fused one way and split another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gemma2tool.model.lazy import LazyTensor, StackedRows
from gemma2tool.verify.diagnosis.names import place
from gemma2tool.verify.diagnosis.signature import Signature, Transform, Weights
from gemma2tool.verify.diagnosis.views import Rows

GATING = ("gate_proj", "up_proj")


def _fused(order: Callable[[int], np.ndarray]) -> Transform:
    """gate and up fused in one order of rows and split as if in another."""

    def transform(weights: Weights, name: str) -> LazyTensor | None:
        parts = [weights.sibling(name, kind) for kind in GATING]
        if any(part is None or part.dtype != parts[0].dtype for part in parts):
            return None
        size = parts[0].rows
        first = size * GATING.index(place(name).kind)
        return Rows(StackedRows(parts), order(size)[first : first + size])

    return transform


def alternating(size: int) -> np.ndarray:
    """Rows of [gate; up] as gate 0, up 0, gate 1, up 1, ..."""
    return np.arange(2 * size).reshape(2, size).T.reshape(-1)


SIGNATURES = (
    Signature(
        "mlp.missplit",
        GATING,
        "{what} {have} each other's rows: they were fused row by row (gate, up, gate, up) and split as if all of gate came first",
        _fused(alternating),
    ),
    Signature(
        "mlp.missplit",
        GATING,
        "{what} {have} each other's rows: they were fused as all of gate, all of up and split row by row",
        _fused(lambda size: np.argsort(alternating(size))),
    ),
)
