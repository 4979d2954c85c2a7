"""Two distributions of which one is known at its likeliest tokens only: bounds on their KL divergence.

With p known everywhere and q at k tokens, the tokens that are left have the mass 1 - sum(q) together. By the log-sum
inequality KL is smallest where q is proportional to p there. KL(p || q) has no upper bound, because a token that is
left may have any small q. KL(q || p) has: q is at most its smallest known value, so its mass is at worst on the tokens
with the smallest p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_FLOOR = 1e-9
"""Mass that a sum of rounded probabilities cannot tell from none."""


@dataclass(frozen=True)
class KLBounds:
    """In nats. ``kl``: KL(p || q) is at least this. ``reverse_low``, ``reverse_high``: KL(q || p) is between them.
    ``mass``: of the known tokens, by p."""

    kl: float
    reverse_low: float
    reverse_high: float
    mass: float


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """(..., V) logits as log-probabilities in double precision."""
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))


def kl_bounds(log_p: NDArray[np.float64], ids: NDArray[np.int64], log_q: NDArray[np.float64]) -> KLBounds:
    """``log_p``: (V,), all of it. ``ids``, ``log_q``: (k,), the tokens of which q is known."""
    known_p, q = log_p[ids], np.exp(log_q)
    p = np.exp(known_p)
    left_p, left_q = max(1 - float(p.sum()), 0.0), max(1 - float(q.sum()), 0.0)
    ratio = math.log((left_p + _FLOOR) / (left_q + _FLOOR))
    kl = float((p * (known_p - log_q)).sum()) + left_p * ratio
    known = float((q * (log_q - known_p)).sum())
    high = known + (_farthest(np.delete(log_p, ids), float(log_q.min()), left_q) if left_q > _FLOOR else 0.0)
    low = known - left_q * ratio
    return KLBounds(max(kl, 0.0), max(low, 0.0), max(high, low, 0.0), float(p.sum()))


def _farthest(log_p: NDArray[np.float64], largest: float, mass: float) -> float:
    """The largest sum of q log(q / p) with q <= exp(``largest``) and the sum ``mass``."""
    largest_share = math.exp(largest)
    count = min(math.ceil(mass / largest_share), log_p.size)
    if not count:
        return 0.0
    smallest = np.partition(log_p, count - 1)[:count]
    return float(mass * (math.log(min(largest_share, mass)) - smallest.mean()))
