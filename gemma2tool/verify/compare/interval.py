"""How well a mean over windows of text is known."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BOOTSTRAP_DRAWS = 4000


def bootstrap_interval(kl: NDArray[np.float64], weights: NDArray[np.float64] | None = None) -> tuple[float, float]:
    """The 95 % interval of the mean of windows (N,), from windows drawn with replacement; ``weights``: their tokens."""
    drawn = np.random.default_rng(0).integers(0, len(kl), (BOOTSTRAP_DRAWS, len(kl)))
    weights = np.ones(len(kl)) if weights is None else weights
    means = (kl * weights)[drawn].sum(1) / weights[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
