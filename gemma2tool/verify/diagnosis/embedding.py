"""Mistakes in the embedding: its scale, and rows too many, too few or in the wrong place."""

from __future__ import annotations

import numpy as np

from gemma2tool.model.lazy import BFLOAT16, FLOAT32, LazyTensor, MappedRows, to_float32
from gemma2tool.verify.diagnosis.names import EMBEDDINGS
from gemma2tool.verify.diagnosis.signature import Signature, Transform, Weights
from gemma2tool.verify.diagnosis.views import Shifted

FARTHEST = 4  # rows by which a table is looked for elsewhere; and 128, the rows that some releases pad with


def _scaled(power: int, dtype: np.dtype = FLOAT32) -> Transform:
    """Times sqrt(D) to a power, with the root rounded to ``dtype``."""

    def transform(weights: Weights, name: str) -> LazyTensor:
        root = to_float32(np.array(weights.config.embed_scale).astype(dtype))
        factor = np.float32(root if power > 0 else 1 / root)
        return MappedRows(weights[name], lambda rows: to_float32(rows) * factor, FLOAT32)

    return transform


def _shifted(by: int) -> Transform:
    return lambda weights, name: Shifted(weights[name], by) if abs(by) < weights[name].rows else None


def resized(here: int, rows: int) -> Signature:
    """A table of ``here`` rows that has ``rows`` after some were added or cut off at its end."""
    if rows > here:
        says = f"{{what}} {{have}} {rows - here} rows more than the vocabulary of {here}: padding was not cut off"
    else:
        says = f"{{what}} {{have}} {here - rows} rows less than the vocabulary of {here}: they were cut off at the end"
    kept = "embedding.padded" if rows > here else "embedding.truncated"
    return Signature(kept, EMBEDDINGS, says, lambda weights, name: Shifted(weights[name], 0, rows))


SIGNATURES = (
    Signature(
        "embedding.scaled",
        ("embed_tokens",),
        "{what} {are} {exactly}sqrt(D) times too large: Gemma scales embeddings when it runs, here it is done in the file as well",
        _scaled(1),
    ),
    Signature(
        "embedding.scaled",
        ("embed_tokens",),
        "{what} {are} too large by {exactly}sqrt(D) rounded to bfloat16: Gemma scales embeddings when it runs, here it is done in the"
        " file as well",
        _scaled(1, BFLOAT16),
    ),
    Signature(
        "embedding.unscaled",
        ("embed_tokens",),
        "{what} {are} sqrt(D) times too small: a scale that was never in the file was taken out of it",
        _scaled(-1),
    ),
    Signature(
        "embedding.unscaled",
        ("embed_tokens",),
        "{what} {are} too small by sqrt(D) rounded to bfloat16: a scale that was never in the file was taken out of it",
        _scaled(-1, BFLOAT16),
    ),
    *(
        Signature(
            "embedding.shifted",
            EMBEDDINGS,
            f"the rows of {{what}} are shifted by {abs(by)}: row {max(-by, 0)} holds the source's row {max(by, 0)}, so that every"
            " token means another",
            _shifted(by),
        )
        for distance in (*range(1, FARTHEST + 1), 128)
        for by in (distance, -distance)
    ),
)
