"""From measurements to gates: which limits hold, and the sentence that says so."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.finding import Finding, GateResult
from gemma2tool.verify.gates import Gates
from gemma2tool.verify.json_values import significant

if TYPE_CHECKING:
    from gemma2tool.verify.compare.logits import LogitRun, Probe
    from gemma2tool.verify.compare.metrics import LogitMetrics

# A candidate whose KL stays within this many times that of equally large noise behaves like noise: rounding errors of
# one scale go together, so they cost somewhat more than independent ones.
ENVELOPE = 3.0


def tensors(comparisons: Sequence[TensorComparison]) -> GateResult:
    """The tensors gate: ``failed`` when any comparison is not ok."""
    gate = "tensors"
    findings = []
    for each in comparisons:
        if not each.ok:
            findings.append(Finding(gate, "error", each.name, each.message))
        elif each.source_nonfinite:
            said = f"{each.source_nonfinite} values are NaN or infinite, as in the source"
            findings.append(Finding(gate, "warning", each.name, said))
        elif each.rule == "reported":
            said = f"stored as {each.candidate_type}, whose bound is not known: RMSE / RMS {each.relative_rmse:.3g}"
            findings.append(Finding(gate, "warning", each.name, said))
        elif each.rule == "folded":
            said = "carries scales of the weights it feeds; what they compute together is compared with theirs"
            findings.append(Finding(gate, "note", each.name, said))
        elif each.rule == "expected" and each.max_abs_error:
            said = f"the target's own convention loses up to {each.max_abs_error:.3g} of it, and no more is lost"
            findings.append(Finding(gate, "note", each.name, said))
    wrong = [finding for finding in findings if finding.severity == "error"]
    metrics = {"tensors": {each.name: each.to_json() for each in comparisons}, "by_type": by_type(comparisons)}
    if wrong:
        more = f" (and {len(wrong) - 1} more of {len(comparisons)})" if len(wrong) > 1 else ""
        return GateResult(gate, "failed", f"{wrong[0].subject}: {wrong[0].message}{more}", metrics, tuple(findings))
    return GateResult(gate, "passed", _summary(comparisons), metrics, tuple(findings))


def _summary(comparisons: Sequence[TensorComparison]) -> str:
    said = []
    folded = sum(each.rule == "folded" for each in comparisons)
    equal = sum(not each.rmse and not each.max_abs_error for each in comparisons) - folded
    if equal:
        said.append(f"{equal} bit for bit")
    if folded:
        said.append(f"{folded} with scales of the weights they feed")
    for rule, words in (
        ("cast", "rounded to {}"),
        ("expected", "as the target's convention makes them"),
        ("bound", "within {}"),
    ):
        types = Counter(each.candidate_type for each in comparisons if each.rule == rule and each.max_abs_error)
        if types:
            said.append(f"{sum(types.values())} {words.format(', '.join(sorted(types)))}")
    text = f"{len(comparisons)} tensors: " + ", ".join(said)
    worst = max(comparisons, key=lambda each: each.relative_rmse, default=None)
    if worst is not None and worst.rmse:
        text += f"; largest RMSE / RMS {worst.relative_rmse:.3g} ({worst.name})"
    return text


def by_type(comparisons: Sequence[TensorComparison]) -> dict[str, dict[str, Any]]:
    """Errors over all tensors of one stored type: number of tensors and values, RMSE, RMSE / RMS, SNR in dB, largest
    error."""
    rows = {}
    for stored in sorted({each.candidate_type for each in comparisons}):
        group = [each for each in comparisons if each.candidate_type == stored]
        values = sum(each.values for each in group)
        noise = sum(each.rmse**2 * each.values for each in group)
        signal = sum(each.rms**2 * each.values for each in group)
        rows[stored] = {
            "tensors": len(group),
            "values": values,
            "rmse": significant(math.sqrt(noise / values)),
            "relative_rmse": significant(math.sqrt(noise / signal)) if signal else (math.inf if noise else 0.0),
            "snr_db": significant(10 * math.log10(signal / noise)) if signal and noise else math.inf,
            "max_abs_error": significant(max(each.max_abs_error for each in group)),
        }
    return rows


def wants_envelope(metrics: LogitMetrics, limits: Gates, comparisons: Sequence[TensorComparison]) -> bool:
    """Whether a divergence beyond the limits might be no more than what noise of that size does to this model: only
    where every tensor is within its bound, and some are not exact."""
    beyond = any(limit not in ("logits", "ppl_ratio") for limit, _ in _exceeded(metrics, limits, text=False))
    return (
        beyond
        and not any(metrics.nonfinite)
        and all(each.ok for each in comparisons)
        and any(each.rmse for each in comparisons)
    )


def logits(run: LogitRun, kind: str, limits: Gates, text: bool, envelope: LogitMetrics | None) -> list[GateResult]:
    """The logits gate, the probe gate and the distribution gate."""
    return [_logits(run, limits), _probe(run.probe, limits), _distribution(run.metrics, kind, limits, text, envelope)]


def engine(metrics: LogitMetrics, kind: str, limits: Gates) -> list[GateResult]:
    """The logits gate and the distribution gate for one prompt that another program ran."""
    where = f"{metrics.positions} positions"
    report: dict[str, Any] = {"shape": [1, metrics.positions]}
    logits = _agreement("logits", metrics, limits, report, where, "", metrics.positions)
    return [logits, _distribution(metrics, kind, limits, False, None)]


def _logits(run: LogitRun, limits: Gates) -> GateResult:
    batch, tokens = run.ids.shape
    report: dict[str, Any] = {
        "shape": [batch, tokens],
        "sliding_window": None if run.windows is None else list(run.windows),
        "sliding_window_reduced": run.shrunk,
    }
    where = f"{run.metrics.positions} positions"
    if run.shrunk:
        where += f", {_windows(run.windows)}"
    parting = run.drift.parting()
    parted = "" if parting is None else "; hidden states part " + _depth(parting)
    return _agreement("logits", run.metrics, limits, report, where, parted, tokens)


def _probe(probe: Probe | None, limits: Gates) -> GateResult:
    """Same limits as the logits: of equal weights all is equal, however large the scores."""
    if probe is None:
        return GateResult("probe", "skipped", "not asked for")
    low, high = min(probe.gains), max(probe.gains)
    times = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    report: dict[str, Any] = {
        "shape": [1, probe.metrics.positions],
        "sliding_window": None if probe.windows is None else list(probe.windows),
        "last_position": probe.last_position,
        "amplified_to": probe.cap,
        "amplification": list(probe.gains),
    }
    where = f"attention scores times {times} to reach {probe.cap:g}, positions up to {probe.last_position}"
    if probe.windows is not None:
        where += f", {_windows(probe.windows)}"
    if not any(probe.metrics.nonfinite):
        report |= {"kl_mean": significant(probe.metrics.mean_kl), "top1_agreement": significant(probe.metrics.top1)}
    return _agreement("probe", probe.metrics, limits, report, where, "", probe.metrics.positions)


def _agreement(
    gate: str, metrics: LogitMetrics, limits: Gates, report: dict[str, Any], where: str, more: str, tokens: int
) -> GateResult:
    """Both sides' logits held to ``limits``; ``where`` says what was run, ``more`` what else is known of a difference, ``tokens`` how
    many there are to a prompt."""
    report["limits"] = _given(limits, "logits", "logits_rtol")
    if any(metrics.nonfinite):
        broken, theirs = metrics.nonfinite
        said = f"{broken} logits of the source and {theirs} of the candidate are NaN or infinite"
        return GateResult(gate, "failed", said, report, (Finding(gate, "error", None, said),))
    report |= {
        "max_abs_difference": significant(metrics.max_abs_difference),
        "mean_abs_difference": significant(metrics.mean_abs_difference),
        "beyond_limit": metrics.beyond if limits.logits is not None else None,
    }
    summary = f"largest difference {metrics.max_abs_difference:.3g}, mean {metrics.mean_abs_difference:.3g} ({where})"
    if limits.logits is None:
        return GateResult(gate, "reported", summary, report)
    if not metrics.beyond:
        return GateResult(gate, "passed", summary, report)
    position, token = metrics.max_at
    said = (
        f"{metrics.beyond} of {metrics.logits} logits differ by more than {limits.logits:g} +"
        f" {limits.logits_rtol or 0:g} x |logit|; the largest difference, {metrics.max_abs_difference:.4g}, at position"
        f" {position % tokens} for token {token}{more}"
    )
    return GateResult(gate, "failed", said, report, (Finding(gate, "error", None, said),))


def _windows(windows: tuple[int, int]) -> str:
    ours, theirs = windows
    return f"sliding window set to {ours}" + ("" if ours == theirs else f" and {theirs}")


def _depth(depth: int) -> str:
    return "at the embeddings" if depth == 0 else f"in layer {depth - 1}"


def _distribution(
    metrics: LogitMetrics, kind: str, limits: Gates, text: bool, envelope: LogitMetrics | None
) -> GateResult:
    gate = "distribution"
    if any(metrics.nonfinite):
        return GateResult(gate, "skipped", "logits are not finite")
    names = ("kl", "kl_p99", "kl_max", "top1", "ppl_ratio")
    report = metrics.distribution() | {"kind": kind, "limits": _given(limits, *names)}
    if text:
        report |= metrics.prediction()
    summary = f"KL mean {metrics.mean_kl:.3g}, 99 % {metrics.kl_percentile(99):.3g}; top-1 agreement {metrics.top1:.1%}"
    if "perplexity_ratio" in report:
        summary += f"; perplexity {report['perplexity_source']:.4g} -> {report['perplexity_candidate']:.4g}"
    exceeded = [(name, said) for name, said in _exceeded(metrics, limits, text) if name != "logits"]
    if envelope is not None:
        report["noise_envelope"] = envelope.distribution()
    if exceeded and envelope is not None and _like_noise(metrics, envelope):
        said = (
            "; ".join(said for _, said in exceeded) + f". Noise of the same size in the source's own weights gives KL"
            f" {envelope.mean_kl:.3g} and top-1 agreement {envelope.top1:.1%}: this model's logits are that sensitive"
        )
        return GateResult(gate, "passed", summary, report, (Finding(gate, "warning", None, said),))
    findings = tuple(Finding(gate, "error", None, said) for _, said in exceeded)
    if findings:
        return GateResult(gate, "failed", "; ".join(finding.message for finding in findings), report, findings)
    held = any(getattr(limits, name) is not None for name in names)
    return GateResult(gate, "passed" if held else "reported", summary, report)


def _exceeded(metrics: LogitMetrics, limits: Gates, text: bool) -> list[tuple[str, str]]:
    measured = {"kl": metrics.mean_kl, "kl_p99": metrics.kl_percentile(99), "kl_max": float(metrics.kl.max())}
    words = {
        "kl": "mean KL",
        "kl_p99": "99th percentile of KL",
        "kl_max": "largest KL",
        "ppl_ratio": "perplexity ratio",
    }
    if text:
        measured["ppl_ratio"] = metrics.prediction().get("perplexity_ratio", 1.0)
    found = []
    for name, value in measured.items():
        limit = getattr(limits, name)
        if limit is not None and not value <= limit:
            found.append((name, f"{words[name]} {value:.4g} exceeds {limit:g}"))
    if limits.top1 is not None and not metrics.top1 >= limits.top1:
        found.append(("top1", f"top-1 agreement {metrics.top1:.1%} is below {limits.top1:.1%}"))
    return found


def _like_noise(metrics: LogitMetrics, envelope: LogitMetrics) -> bool:
    share = envelope.top1
    doubt = 3 * math.sqrt(2 * share * (1 - share) / envelope.positions)
    return metrics.mean_kl <= ENVELOPE * envelope.mean_kl and metrics.top1 >= share - doubt


def _given(limits: Gates, *names: str) -> dict[str, float]:
    return {name: value for name, value in dataclasses.asdict(limits).items() if name in names and value is not None}
