"""The one-pass metrics against the same metrics computed directly in double precision."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2tool.verify.compare import metrics as metrics_module
from gemma2tool.verify.compare.metrics import LogitComparison, LogitMetrics


def run(
    source: np.ndarray, candidate: np.ndarray, following: np.ndarray, cuts: list[int], **limits: float
) -> LogitMetrics:
    comparison = LogitComparison(source.shape[0], following, **limits)
    bounds = [0, *sorted(set(cuts)), source.shape[1]]
    for first, last in pairwise(bounds):
        if first < last:
            comparison.add(first, source[:, first:last], candidate[:, first:last])
    return comparison.finish()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    top = wide.max(1, keepdims=True)
    return wide - top - np.log(np.exp(wide - top).sum(1, keepdims=True))


def pair(positions: int, vocabulary: int, distance: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    source = (generator.standard_normal((positions, vocabulary)) * 8).astype(np.float32)
    candidate = source + (generator.standard_normal((positions, vocabulary)) * distance).astype(np.float32)
    return source, candidate, np.append(generator.integers(0, vocabulary, positions - 1), -1)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9), st.integers(2, 60), st.sampled_from([0.0, 1e-6, 0.01, 1.0, 30.0]), st.integers(0, 99),
    st.lists(st.integers(1, 59), max_size=5), st.integers(1, 64),
)  # fmt: skip
def test_metrics_do_not_depend_on_how_the_vocabulary_is_cut(
    positions: int, vocabulary: int, distance: float, seed: int, cuts: list[int], at_once: int
) -> None:
    source, candidate, following = pair(positions, vocabulary, distance, seed)
    before, metrics_module._AT_ONCE = metrics_module._AT_ONCE, at_once
    try:
        metrics = run(source, candidate, following, [cut for cut in cuts if cut < vocabulary])
    finally:
        metrics_module._AT_ONCE = before
    p, q = log_softmax(source), log_softmax(candidate)
    np.testing.assert_allclose(metrics.kl, (np.exp(p) * (p - q)).sum(1), rtol=1e-9, atol=1e-13)
    np.testing.assert_array_equal(metrics.same_top, source.argmax(1) == candidate.argmax(1))
    np.testing.assert_array_equal(metrics.source_top, source.argmax(1))
    gaps = source.max(1).astype(np.float64) - source[np.arange(positions), candidate.argmax(1)]
    np.testing.assert_array_equal(metrics.top_gap, gaps)
    difference = np.abs(source.astype(np.float64) - candidate)
    assert metrics.max_abs_difference == difference.max()
    if distance:
        assert difference[metrics.max_at] == difference.max()
    assert metrics.mean_abs_difference == pytest.approx(difference.mean(), rel=1e-12)
    rows = np.flatnonzero(following >= 0)
    np.testing.assert_allclose(metrics.log_p[0], p[rows, following[rows]], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(metrics.log_p[1], q[rows, following[rows]], rtol=1e-12, atol=1e-12)
    assert metrics.positions == positions and metrics.logits == source.size


def test_a_shift_of_all_logits_is_a_difference_without_divergence() -> None:
    source, _, following = pair(5, 40, 0, 0)
    metrics = run(source, source + np.float32(0.5), following, [13])
    assert metrics.max_abs_difference == pytest.approx(0.5, abs=1e-5) and metrics.mean_kl < 1e-12 and metrics.top1 == 1


def test_perplexity_and_its_standard_error() -> None:
    source, candidate, following = pair(50, 30, 0.5, 3)
    metrics = run(source, candidate, following, []).prediction()
    rows = np.arange(49)
    source_nll, candidate_nll = (
        -log_softmax(source)[rows, following[:-1]],
        -log_softmax(candidate)[rows, following[:-1]],
    )
    assert metrics["perplexity_source"] == pytest.approx(np.exp(source_nll.mean()), rel=1e-5)
    assert metrics["perplexity_candidate"] == pytest.approx(np.exp(candidate_nll.mean()), rel=1e-5)
    se = (candidate_nll - source_nll).std(ddof=1) / 7
    assert metrics["perplexity_ratio_se"] == pytest.approx(np.exp((candidate_nll - source_nll).mean()) * se, rel=1e-5)
    change = np.exp(-candidate_nll) - np.exp(-source_nll)
    assert metrics["chosen_probability_change_mean"] == pytest.approx(change.mean(), rel=1e-4)
    assert metrics["predicted_tokens"] == 49


def test_logits_beyond_the_limit_are_counted() -> None:
    source = np.array([[0.0, 10.0, -20.0]], np.float32)
    candidate = source + np.array([[0.5, 1.4, -2.6]], np.float32)
    assert run(source, candidate, np.array([-1]), [1], atol=0.4, rtol=0.1).beyond_limit == 2


def test_a_nonfinite_logit_ends_the_comparison() -> None:
    source, candidate, following = pair(4, 20, 0.1, 1)
    candidate[2, 3] = np.nan
    metrics = run(source, candidate, following, [10])
    assert metrics.nonfinite == (0, 1) and np.isnan(metrics.mean_kl)


def test_the_extreme_percentile_needs_many_positions() -> None:
    source, candidate, following = pair(200, 10, 0.5, 4)
    metrics = run(source, candidate, following, [])
    assert metrics.kl_percentile(99) == np.percentile(metrics.kl, 99)
    assert "kl_p99_9" not in metrics.distribution()
    source, candidate, following = pair(10_000, 4, 0.5, 4)
    assert "kl_p99_9" in run(source, candidate, following, []).distribution()


def test_positions_where_two_tokens_are_nearly_as_likely() -> None:
    source = np.array([[5.0, 4.9, 0.0], [5.0, 4.0, 0.0], [5.0, 0.0, 0.0]], np.float32)
    candidate = source[:, [1, 0, 2]]  # the first two tokens exchanged
    metrics = run(source, candidate, np.full(3, -1), [1])
    assert [metrics.near_ties(gap) for gap in (0.0, 0.2, 1.0, 9.0)] == [0, 1, 2, 3]
    assert run(source, source, np.full(3, -1), []).near_ties(9.0) == 0
