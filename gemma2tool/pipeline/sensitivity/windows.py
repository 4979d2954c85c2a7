"""Which windows of a text choose the codes, and which others show what the codes cost."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma2tool.errors import UsageError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.calibration.text import SAMPLES, read_sequences, spread
from gemma2tool.pipeline.sensitivity.table import Text

ALL = 1 << 31


@dataclass(frozen=True)
class Windows:
    """``calibration`` and ``evaluation``: token ids (N, T), and the texts that they are from."""

    calibration: NDArray[np.int64]
    evaluation: NDArray[np.int64]
    texts: tuple[Text, Text]


def read_windows(
    checkpoint: Checkpoint,
    calibration: Path,
    evaluation: Path | None,
    *,
    samples: int | None,
    length: int | None,
    windows: int,
) -> Windows:
    """``samples`` windows of ``length`` tokens that ``quantize --calibration`` would take too, and ``windows`` of the
    ``evaluation`` text; None: others of the same text, whose own windows give way where there are too few.

    Raises ``UsageError`` (``sensitivity.short``) where that leaves fewer for the codes than for the evaluation.
    """
    rows = read_sequences(calibration, checkpoint, samples=ALL, length=length)
    if evaluation is not None:
        judged = read_sequences(evaluation, checkpoint, samples=windows, length=length)
        chosen = spread(np.arange(len(rows)), samples or SAMPLES)
        return Windows(rows[chosen], judged, (describe(calibration, rows[chosen]), describe(evaluation, judged)))
    if len(rows) < 2 * windows:
        raise UsageError(
            "sensitivity.short",
            f"{calibration}: fills {len(rows)} windows of {rows.shape[1]} tokens, but {2 * windows} are needed",
            hint="pass a longer text, a smaller --calibration-length, or fewer --windows",
        )
    chosen = spread(np.arange(len(rows)), min(samples or SAMPLES, len(rows) - windows))
    others = spread(np.setdiff1d(np.arange(len(rows)), chosen), windows)
    texts = describe(calibration, rows[chosen]), describe(calibration, rows[others])
    return Windows(rows[chosen], rows[others], texts)


def describe(path: Path, ids: NDArray[np.int64]) -> Text:
    """The name of a text with the digest and the shape of the windows taken from it."""
    digest = hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).hexdigest()
    return Text(path.name, digest, *ids.shape)
