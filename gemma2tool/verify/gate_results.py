"""From measurements to gates: which limits apply, and the sentence that states the outcome."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.compare.interval import bootstrap_interval
from gemma2tool.verify.compare.measurements import depth_name
from gemma2tool.verify.compare.metrics import LogitMetrics
from gemma2tool.verify.finding import Finding, GateResult
from gemma2tool.verify.gates import GATES, Gates
from gemma2tool.verify.json_values import significant

if TYPE_CHECKING:
    from gemma2tool.verify.compare.logits import LogitRun, Probe  # imports torch

ENVELOPE = 3.0
"""A candidate whose KL is within this many times that of equally large noise behaves like noise.

Rounding errors that share a scale are correlated, so they have somewhat more effect than independent ones.
"""

TIE_DEVIATIONS = 3.0
"""Standard deviations by which noise may make the other of two tokens likelier."""

INTERVAL_PROMPTS = 8
"""Prompts of text from which on their mean KL gets an interval."""


def tensors_gate(comparisons: Sequence[TensorComparison]) -> GateResult:
    """The tensors gate; it fails if any comparison is not ok."""
    gate = "tensors"
    findings = tuple(finding for comparison in comparisons for finding in _tensor_findings(gate, comparison))
    errors = [finding for finding in findings if finding.severity == "error"]
    metrics = {
        "tensors": {comparison.name: comparison.to_json() for comparison in comparisons},
        "by_type": _by_type(comparisons),
    }
    if errors:
        more = f" (and {len(errors) - 1} more of {len(comparisons)})" if len(errors) > 1 else ""
        return GateResult(gate, "failed", f"{errors[0].subject}: {errors[0].message}{more}", metrics, findings)
    return GateResult(gate, "passed", _tensors_summary(comparisons), metrics, findings)


def _tensor_findings(gate: str, comparison: TensorComparison) -> Iterator[Finding]:
    """At most one finding."""
    name = comparison.name
    if not comparison.ok:
        yield Finding(gate, "error", name, comparison.message)
    elif comparison.source_nonfinite:
        message = f"{comparison.source_nonfinite} values are NaN or infinite, as in the source"
        yield Finding(gate, "warning", name, message)
    elif comparison.rule == "reported":
        message = (
            f"stored as {comparison.candidate_type}, a type without a known bound: RMSE / RMS"
            f" {comparison.relative_rmse:.3g}"
        )
        yield Finding(gate, "warning", name, message)
    elif comparison.rule == "folded":
        message = "carries the scales of the weights it feeds; their product was compared"
        yield Finding(gate, "note", name, message)
    elif comparison.rule == "tuned":
        message = f"was tuned: differs from the source's by up to {comparison.max_abs_error:.3g}"
        yield Finding(gate, "note", name, message)
    elif comparison.rule == "expected" and comparison.max_abs_error:
        message = f"the target's own convention loses up to {comparison.max_abs_error:.3g} of it; nothing else is lost"
        yield Finding(gate, "note", name, message)


def _tensors_summary(comparisons: Sequence[TensorComparison]) -> str:
    parts = []
    folded = sum(comparison.rule == "folded" for comparison in comparisons)
    equal = sum(not comparison.rmse and not comparison.max_abs_error for comparison in comparisons) - folded
    if equal:
        parts.append(f"{equal} bit for bit")
    if folded:
        parts.append(f"{folded} with scales of the weights they feed")
    if tuned := sum(comparison.rule == "tuned" for comparison in comparisons):
        parts.append(f"{tuned} norms tuned")
    for rule, words in (
        ("cast", "rounded to {}"),
        ("expected", "after the target's convention"),
        ("bound", "within {} bounds"),
    ):
        types = Counter(
            comparison.candidate_type
            for comparison in comparisons
            if comparison.rule == rule and comparison.max_abs_error
        )
        if types:
            parts.append(f"{sum(types.values())} {words.format(', '.join(sorted(types)))}")
    summary = f"{len(comparisons)} tensors: " + ", ".join(parts)
    worst = max(comparisons, key=lambda comparison: comparison.relative_rmse, default=None)
    if worst is not None and worst.rmse:
        summary += f"; largest RMSE / RMS {worst.relative_rmse:.3g} ({worst.name})"
    return summary


def _by_type(comparisons: Sequence[TensorComparison]) -> dict[str, dict[str, Any]]:
    """Errors over all tensors of each stored type: number of tensors and values, RMSE, RMSE / RMS, SNR in dB, largest
    error."""
    rows = {}
    for stored in sorted({comparison.candidate_type for comparison in comparisons}):
        group = [comparison for comparison in comparisons if comparison.candidate_type == stored]
        values = sum(comparison.values for comparison in group)
        noise = sum(comparison.rmse**2 * comparison.values for comparison in group)
        signal = sum(comparison.rms**2 * comparison.values for comparison in group)
        rows[stored] = {
            "tensors": len(group),
            "values": values,
            "rmse": significant(math.sqrt(noise / values)),
            "relative_rmse": significant(math.sqrt(noise / signal)) if signal else (math.inf if noise else 0.0),
            "snr_db": significant(10 * math.log10(signal / noise)) if signal and noise else math.inf,
            "max_abs_error": significant(max(comparison.max_abs_error for comparison in group)),
        }
    return rows


def needs_envelope(metrics: LogitMetrics, limits: Gates, comparisons: Sequence[TensorComparison]) -> bool:
    """Whether a divergence beyond the limits might be only the effect of noise of that size on this model.

    True only if every tensor is within its limits and some are not exact.
    """
    is_beyond = any(limit not in ("logits", "ppl_ratio") for limit, _ in _exceeded(metrics, limits, text=False))
    return (
        is_beyond
        and not any(metrics.nonfinite)
        and all(comparison.ok for comparison in comparisons)
        and any(comparison.rmse for comparison in comparisons)
    )


def logits_gates(
    run: LogitRun, kind: str, limits: Gates, text: bool, envelope: LogitMetrics | None
) -> list[GateResult]:
    """The logits gate, the probe gate and the distribution gate. ``envelope``: metrics of equally large noise."""
    distribution = _distribution(run.metrics, kind, limits, text, envelope, prompts=len(run.ids))
    return [_logits(run, limits), _probe(run.probe, limits), distribution]


def usual_gates(run: LogitRun, kind: str, text: bool) -> list[GateResult]:
    """The same gates by the usual limits of the kind, of a run that counted logits beyond other ones."""
    usual = GATES[kind]

    def counted(metrics: LogitMetrics) -> LogitMetrics:
        within = usual.logits is None or metrics.max_abs_difference <= usual.logits
        return dataclasses.replace(metrics, beyond_limit=0) if within else metrics

    probe = None if run.probe is None else dataclasses.replace(run.probe, metrics=counted(run.probe.metrics))
    recounted = dataclasses.replace(run, metrics=counted(run.metrics), probe=probe)
    return logits_gates(recounted, kind, usual, text, None)


def engine_gates(metrics: LogitMetrics, kind: str, limits: Gates) -> list[GateResult]:
    """The logits gate and the distribution gate for one prompt that another program ran.

    A prompt is short, so that a few positions where two tokens are nearly as likely would decide the agreement. They
    count as agreeing.
    """
    report: dict[str, Any] = {"shape": [1, metrics.positions]}
    logits = _agreement("logits", metrics, limits, report, f"{metrics.positions} positions")
    return [logits, _distribution(metrics, kind, limits, False, None, tie=_tie(metrics, limits))]


def _tie(metrics: LogitMetrics, limits: Gates) -> float:
    """By how much two logits may differ to change places by noise of the measured KL, up to the limit of KL.

    Noise of variance v in the logits has a KL of v / 2. The difference of two logits then has the standard deviation
    sqrt(2 v), which is 2 sqrt(KL).
    """
    kl = metrics.mean_kl if limits.kl is None else min(metrics.mean_kl, limits.kl)
    return TIE_DEVIATIONS * 2 * math.sqrt(kl)


def _logits(run: LogitRun, limits: Gates) -> GateResult:
    report: dict[str, Any] = {
        "shape": list(run.ids.shape),
        "sliding_window": None if run.windows is None else list(run.windows),
        "sliding_window_reduced": run.window_reduced,
    }
    where = f"{run.metrics.positions} positions"
    if run.window_reduced and run.windows is not None:
        where += f", {_windows(run.windows)}"
    depth = run.drift.first_divergence()
    divergence = "" if depth is None else f"; hidden states first diverge {depth_name(depth)}"
    return _agreement("logits", run.metrics, limits, report, where, divergence)


def _probe(probe: Probe | None, limits: Gates) -> GateResult:
    """The same limits as for the logits: equal weights give equal results, however large the scores."""
    if probe is None:
        return GateResult("probe", "skipped", "not requested")
    low, high = min(probe.gains), max(probe.gains)
    gains = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    report: dict[str, Any] = {
        "shape": [1, probe.metrics.positions],
        "sliding_window": None if probe.windows is None else list(probe.windows),
        "last_position": probe.last_position,
        "amplified_to": probe.cap,
        "amplification": list(probe.gains),
    }
    where = f"attention scores times {gains} to reach {probe.cap:g}, positions up to {probe.last_position}"
    if probe.windows is not None:
        where += f", {_windows(probe.windows)}"
    if not any(probe.metrics.nonfinite):
        report |= {"kl_mean": significant(probe.metrics.mean_kl), "top1_agreement": significant(probe.metrics.top1)}
    return _agreement("probe", probe.metrics, limits, report, where)


def _agreement(
    gate: str, metrics: LogitMetrics, limits: Gates, report: dict[str, Any], where: str, detail: str = ""
) -> GateResult:
    """Both sides' logits against ``limits``.

    ``report``: the gate's metrics, with the ``shape`` (B, T) of the prompts; more are added. ``where``: what was run.
    ``detail``: what else is known about a difference.
    """
    tokens = report["shape"][1]
    report["limits"] = _given(limits, "logits", "logits_rtol")
    if any(metrics.nonfinite):
        in_source, in_candidate = metrics.nonfinite
        message = f"{in_source} logits of the source and {in_candidate} of the candidate are NaN or infinite"
        return GateResult(gate, "failed", message, report, (Finding(gate, "error", None, message),))
    report |= {
        "max_abs_difference": significant(metrics.max_abs_difference),
        "mean_abs_difference": significant(metrics.mean_abs_difference),
        "beyond_limit": metrics.beyond_limit if limits.logits is not None else None,
    }
    summary = f"largest difference {metrics.max_abs_difference:.3g}, mean {metrics.mean_abs_difference:.3g} ({where})"
    if limits.logits is None:
        return GateResult(gate, "reported", summary, report)
    if not metrics.beyond_limit:
        return GateResult(gate, "passed", summary, report)
    position, token = metrics.max_at
    message = (
        f"{metrics.beyond_limit} of {metrics.logits} logits differ by more than {limits.logits:g} +"
        f" {limits.logits_rtol or 0:g} x |logit|; the largest difference is {metrics.max_abs_difference:.4g}, at"
        f" position {position % tokens} for token {token}{detail}"
    )
    return GateResult(gate, "failed", message, report, (Finding(gate, "error", None, message),))


def _windows(windows: tuple[int, int]) -> str:
    source, candidate = windows
    return f"sliding window set to {source}" + ("" if source == candidate else f" and {candidate}")


def _distribution(
    metrics: LogitMetrics,
    kind: str,
    limits: Gates,
    text: bool,
    envelope: LogitMetrics | None,
    *,
    prompts: int = 0,
    tie: float | None = None,
) -> GateResult:
    """``tie``: logits that differ by no more are a tie; it counts as agreement."""
    gate = "distribution"
    if any(metrics.nonfinite):
        return GateResult(gate, "skipped", "logits are not finite")
    names = ("kl", "kl_p99", "kl_max", "top1", "ppl_ratio")
    report: dict[str, Any] = metrics.distribution() | {"kind": kind, "limits": _given(limits, *names)}
    if text:
        report |= metrics.prediction()
    summary = f"KL mean {metrics.mean_kl:.3g}, 99 % {metrics.kl_percentile(99):.3g}; top-1 agreement {metrics.top1:.1%}"
    if "perplexity_ratio" in report:
        summary += f"; perplexity {report['perplexity_source']:.4g} -> {report['perplexity_candidate']:.4g}"
    near_ties = 0 if tie is None else metrics.near_ties(tie)
    if tie is not None:
        report |= {"near_ties": near_ties, "tie": significant(tie)}
        summary += f", {near_ties} of {metrics.positions} positions near-ties" if near_ties else ""
    exceeded = [message for _, message in _exceeded(metrics, limits, text, near_ties)]
    if envelope is not None:
        report["noise_envelope"] = envelope.distribution()
    if text and prompts >= INTERVAL_PROMPTS:
        interval = bootstrap_interval(metrics.kl.reshape(prompts, -1).mean(1))
        report["kl_interval"] = [significant(bound) for bound in interval]
    if exceeded and envelope is not None and _is_like_noise(metrics, envelope):
        message = (
            "; ".join(exceeded)
            + f". Noise of the same size in the source's own weights gives KL {envelope.mean_kl:.3g}"
            f" and top-1 agreement {envelope.top1:.1%}: this model's logits are that sensitive"
        )
        return GateResult(gate, "passed", summary, report, (Finding(gate, "warning", None, message),))
    if exceeded:
        findings = tuple(Finding(gate, "error", None, message) for message in exceeded)
        return GateResult(gate, "failed", "; ".join(exceeded), report, findings)
    has_limit = any(getattr(limits, name) is not None for name in names)
    return GateResult(gate, "passed" if has_limit else "reported", summary, report)


def _exceeded(metrics: LogitMetrics, limits: Gates, text: bool, near_ties: int = 0) -> list[tuple[str, str]]:
    """The limits on the distribution that are exceeded: name and sentence. ``near_ties``: positions that count as
    agreeing."""
    measured = {"kl": metrics.mean_kl, "kl_p99": metrics.kl_percentile(99), "kl_max": float(metrics.kl.max())}
    words = {
        "kl": "mean KL",
        "kl_p99": "99th percentile of KL",
        "kl_max": "largest KL",
        "ppl_ratio": "perplexity ratio",
    }
    if text:
        measured["ppl_ratio"] = metrics.prediction().get("perplexity_ratio", 1.0)
    exceeded = []
    for name, value in measured.items():
        limit = getattr(limits, name)
        if limit is not None and not value <= limit:
            exceeded.append((name, f"{words[name]} {value:.4g} exceeds {limit:g}"))
    agreement = (int(metrics.same_top.sum()) + near_ties) / metrics.positions
    if limits.top1 is not None and not agreement >= limits.top1:
        ties = ", near-ties included" if near_ties else ""
        exceeded.append(("top1", f"top-1 agreement {agreement:.1%}{ties} is below {limits.top1:.1%}"))
    return exceeded


def _is_like_noise(metrics: LogitMetrics, envelope: LogitMetrics) -> bool:
    share = envelope.top1
    uncertainty = 3 * math.sqrt(2 * share * (1 - share) / envelope.positions)
    return metrics.mean_kl <= ENVELOPE * envelope.mean_kl and metrics.top1 >= share - uncertainty


def _given(limits: Gates, *names: str) -> dict[str, float]:
    return {name: value for name, value in dataclasses.asdict(limits).items() if name in names and value is not None}
