"""Norms that a candidate says were tuned: within which limit they may differ from the source's.

A file with tuned norms states a checksum of each (``model.norm_checksums``). A norm that differs from the source's is
accepted if it has its checksum and no value of 1 + w, which is what multiplies, changed by more than LARGEST_CHANGE.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.model.norm_checksums import norm_checksum

LARGEST_CHANGE = 0.05
"""Of 1 + w, as a share of the source's; tuning is held to it, too."""

_ROUNDING = 1e-6
"""Of 1 + w in float32, and back."""

TUNED = ""


def tuned_norms(
    source: Mapping[str, LazyTensor], candidate: Checkpoint, expected: Mapping[str, LazyTensor]
) -> dict[str, str]:
    """The norms that the candidate says were tuned and that are not the source's, by canonical name: TUNED, or why
    they are not accepted.

    ``expected``: tensors that the candidate's format changes, as they must be where they were not tuned.
    """
    verdicts = {}
    for name, checksum in candidate.tuned_norms.items():
        if name not in source or name not in candidate.tensors:
            continue
        tensor = candidate.tensors[name]
        if tuple(tensor.shape) != tuple(source[name].shape):
            continue
        required = expected.get(name, source[name])
        before, after = (side.load_rows_f32(0, side.rows) for side in (required, tensor))
        if not np.array_equal(before, after):
            verdicts[name] = _verdict(before, after, checksum, norm_checksum(tensor))
    return verdicts


def _verdict(before: np.ndarray, after: np.ndarray, stated: str, actual: str) -> str:
    gain, change = np.abs(1 + before.astype(np.float64)), np.abs(after.astype(np.float64) - before)
    if not (change <= LARGEST_CHANGE * gain + _ROUNDING * (1 + gain)).all():
        return f"tuning changes 1 + w by at most {LARGEST_CHANGE:.0%}"
    if stated != actual:
        return f"nor is it the norm that was tuned: its checksum is {actual}, the file says {stated}"
    return TUNED
