"""Bounds on KL from the likeliest tokens hold for every distribution that agrees with them."""

from __future__ import annotations

import numpy as np
import pytest

from gemma2tool.verify.compare.top_bounds import kl_bounds, log_softmax

V = 200


def kl(log_p: np.ndarray, log_q: np.ndarray) -> float:
    return float((np.exp(log_p) * (log_p - log_q)).sum())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("known", [1, 5, 50, V])
def test_the_true_value_is_within(seed: int, known: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 3, V)
    log_p = log_softmax(logits)
    log_q = log_softmax(logits + generator.normal(0, generator.choice([0.01, 0.3, 3]), V))
    ids = np.argsort(-log_q)[:known]
    bounds = kl_bounds(log_p, ids, log_q[ids])
    assert bounds.kl <= kl(log_p, log_q) + 1e-6
    assert bounds.reverse_low - 1e-6 <= kl(log_q, log_p) <= bounds.reverse_high + 1e-6
    if known == V:
        assert bounds.kl == pytest.approx(kl(log_p, log_q), abs=1e-6)
        assert bounds.reverse_low == pytest.approx(bounds.reverse_high, abs=1e-6)


def test_equal_distributions() -> None:
    log_p = log_softmax(np.random.default_rng(1).normal(0, 3, V))
    ids = np.argsort(-log_p)[:10]
    bounds = kl_bounds(log_p, ids, log_p[ids])
    assert bounds.kl < 1e-9 and bounds.reverse_low < 1e-9 < bounds.reverse_high


def test_more_known_tokens_show_more() -> None:
    generator = np.random.default_rng(2)
    log_p, log_q = (log_softmax(generator.normal(0, 2, V)) for _ in range(2))
    order = np.argsort(-log_q)
    lower = [kl_bounds(log_p, order[:known], log_q[order[:known]]).kl for known in (1, 5, 20, 100, V)]
    assert lower == sorted(lower)
