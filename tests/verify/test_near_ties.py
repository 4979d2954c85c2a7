"""Top-1 agreement with an engine: near-ties agree, other choices do not."""

from __future__ import annotations

import numpy as np
import pytest

from gemma2tool.verify import gate_results
from gemma2tool.verify.compare.metrics import LogitComparison, LogitMetrics
from gemma2tool.verify.finding import GateResult
from gemma2tool.verify.gates import GATES

POSITIONS, VOCABULARY, EXCHANGED = 48, 500, 5


def compared(gap: float, noise: float) -> LogitMetrics:
    """Two tokens are the likeliest everywhere, ``gap`` apart; at 5 of 48 positions, the candidate exchanges them."""
    generator = np.random.default_rng(0)
    source = generator.standard_normal((POSITIONS, VOCABULARY)).astype(np.float32) / 4
    source[:, 0], source[:, 1] = 2.0, 2.0 - gap
    candidate = source.copy()
    candidate[:, 2:] += generator.standard_normal((POSITIONS, VOCABULARY - 2)).astype(np.float32) * noise
    candidate[:EXCHANGED, :2] = source[:EXCHANGED, 1::-1]
    comparison = LogitComparison(POSITIONS, np.full(POSITIONS, -1))
    comparison.add(0, source, candidate)
    return comparison.finish()


def distribution(metrics: LogitMetrics) -> GateResult:
    return gate_results.engine_gates(metrics, "bf16", GATES["bf16"])[1]


def test_near_ties_agree() -> None:
    gate = distribution(compared(gap=0.1, noise=0.05))
    assert gate.status == "passed" and gate.metrics["top1_agreement"] < 0.9 and gate.metrics["near_ties"] == EXCHANGED
    assert gate.summary.endswith("top-1 agreement 89.6%, 5 of 48 positions near-ties")


@pytest.mark.parametrize(("gap", "noise"), [(0.1, 0.001), (0.7, 0.05)])
def test_less_likely_tokens_are_not_near_ties(gap: float, noise: float) -> None:
    """Beyond what noise of the measured KL explains: because the choice is far off, or the noise small."""
    metrics = compared(gap, noise)
    gate = distribution(metrics)
    assert metrics.mean_kl < GATES["bf16"].kl
    assert gate.failed and gate.summary == "top-1 agreement 89.6% is below 95.0%"
