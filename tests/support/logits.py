"""Comparing logits of two programs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def is_close(logits: NDArray[Any], expected: NDArray[Any]) -> bool:
    """Within 5e-5 plus 1e-5 of the value, everywhere."""
    return bool((np.abs(logits - expected) <= 5e-5 + 1e-5 * np.abs(expected)).all())


def mean_kl(p_logits: NDArray[Any], q_logits: NDArray[Any]) -> float:
    """KL(p || q) in nats, mean over positions."""
    p, q = _softmax(p_logits), _softmax(q_logits)
    return float((p * (np.log(p + 1e-300) - np.log(q + 1e-300))).sum(axis=-1).mean())


def _softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
