"""Mistakes in the embedding: its scale, extra or missing rows, and shifted rows."""

from __future__ import annotations

import numpy as np

from gemma2tool.model.lazy import BFLOAT16, FLOAT32, Array, DType, LazyTensor, MappedRows, to_float32
from gemma2tool.verify.diagnosis.names import EMBEDDINGS
from gemma2tool.verify.diagnosis.signature import Signature, Transform, Weights
from gemma2tool.verify.diagnosis.views import Shifted

SHIFTS = (1, 2, 3, 4, 128)
"""Rows by which a table may be shifted; 128 is what some releases pad with."""


def _scaled(power: int, dtype: DType = FLOAT32) -> Transform:
    """Times sqrt(D) to a power of 1 or -1, with the root rounded to ``dtype``."""

    def transform(weights: Weights, name: str) -> LazyTensor:
        root = to_float32(np.array(weights.config.embed_scale).astype(dtype))
        factor = np.float32(root if power > 0 else 1 / root)

        def multiply(rows: Array) -> Array:
            return to_float32(rows) * factor

        return MappedRows(weights[name], multiply, FLOAT32)

    return transform


def _shifted(by: int) -> Transform:
    return lambda weights, name: Shifted(weights[name], by) if abs(by) < weights[name].rows else None


def resized(source_rows: int, candidate_rows: int) -> Signature:
    """A table of ``source_rows`` rows to which rows were added at the end, or from which rows were cut off."""
    if candidate_rows > source_rows:
        id = "embedding.padded"
        more = candidate_rows - source_rows
        template = (
            f"{{what}} {{have}} {more} more rows than the vocabulary of {source_rows}: padding rows were not removed"
        )
    else:
        id = "embedding.truncated"
        fewer = source_rows - candidate_rows
        template = (
            f"{{what}} {{have}} {fewer} fewer rows than the vocabulary of {source_rows}: rows were cut off at the end"
        )
    return Signature(id, EMBEDDINGS, template, lambda weights, name: Shifted(weights[name], 0, candidate_rows))


SIGNATURES = (
    Signature(
        "embedding.scaled",
        ("embed_tokens",),
        "{what} {are} {exactly}sqrt(D) times too large: the embedding scale, which the model applies when it runs, "
        "is also in the file",
        _scaled(1),
    ),
    Signature(
        "embedding.scaled",
        ("embed_tokens",),
        "{what} {are} too large by {exactly}sqrt(D) rounded to bfloat16: the embedding scale, which the model "
        "applies when it runs, is also in the file",
        _scaled(1, BFLOAT16),
    ),
    Signature(
        "embedding.unscaled",
        ("embed_tokens",),
        "{what} {are} sqrt(D) times too small: an embedding scale was divided out that the file never contained",
        _scaled(-1),
    ),
    Signature(
        "embedding.unscaled",
        ("embed_tokens",),
        "{what} {are} too small by sqrt(D) rounded to bfloat16: an embedding scale was divided out that the file "
        "never contained",
        _scaled(-1, BFLOAT16),
    ),
    *(
        Signature(
            "embedding.shifted",
            EMBEDDINGS,
            f"the rows of {{what}} are shifted by {abs(by)}: row {max(-by, 0)} holds the source's row {max(by, 0)}, "
            "so every token has the row of another",
            _shifted(by),
        )
        for distance in SHIFTS
        for by in (distance, -distance)
    ),
)
