"""Verifications and differences as lines and tables of a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.finding import GateResult
from gemma2tool.verify.reports.quality import quality_line
from gemma2tool.verify.result import Side, Verification

if TYPE_CHECKING:
    from gemma2tool.verify.difference import Difference

_IN_LAYER = re.compile(r"(.*\.layers\.)(\d+)(\..*)")
_MAX_NAMES = 6
"""Names shown of the tensors and fields that a cause explains."""
_MAX_FINDINGS = 12
"""Findings of one gate that are shown; JSON has all of them."""
_MAX_WARNINGS = 3
"""Warnings shown of a gate that passed."""
_MAX_WORST = 5
_PROMPT_END = 8
"""Tokens of a prompt that are shown before its continuation."""
_MAX_FARTHEST = 8


class Out(Protocol):
    """Where the lines go. It escapes every text; styles are rich's."""

    def line(self, *spans: tuple[str, str]) -> None: ...

    def paragraph(self, *spans: tuple[str, str]) -> None: ...

    def item(self, label: tuple[str, str], *spans: tuple[str, str]) -> None: ...

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None: ...

    def can_show(self, text: str) -> bool: ...


Marks = Mapping[str, tuple[str, str, str]]
"""Status -> mark, the same in ASCII, and its style."""

_MARKS: Marks = {
    "passed": ("\u2713", "ok", "green"),
    "failed": ("\u2717", "FAIL", "bold red"),
    "skipped": ("\u2013", "skip", "yellow"),
    "reported": ("\u00b7", "--", "cyan"),
}
_DIFFERENCE_MARKS: Marks = {**_MARKS, "passed": ("=", "=", "green"), "failed": ("\u2260", "!=", "bold yellow")}
_SEVERITY_STYLES = {"error": "red", "warning": "yellow", "note": "dim"}
_KL_STATISTICS = (
    ("mean", "kl_mean"),
    ("median", "kl_median"),
    ("99 %", "kl_p99"),
    ("99.9 %", "kl_p99_9"),
    ("max", "kl_max"),
)


@dataclass(frozen=True)
class _GateStyle:
    """How gates are shown: the width of their names, the number of findings besides the first one (0: the summary says
    enough), the marks, the words for severities, and whether ``notes`` are among the findings.
    """

    width: int
    findings: int
    marks: Marks = field(default_factory=lambda: _MARKS)
    words: Mapping[str, str] = field(default_factory=dict)
    notes: bool = True


def render_verification(result: Verification, out: Out, *, verbose: bool = False) -> None:
    """Show a verification, the verdict first.

    One that passed: its quality in a line, and the gates that have something to say. One that failed: the causes, then
    every gate that did not pass with its findings. ``verbose``: both sides, every gate with all findings, and the
    measurements.
    """
    render_verdict(result, out)
    for cause in result.causes:
        _render_cause(cause, out)
    if verbose:
        _render_sides(result, out)
    width = max((len(gate.name) for gate in result.gates), default=0)
    style = _GateStyle(width, 0 if result.causes and not verbose else _MAX_FINDINGS, notes=verbose)
    if verbose:
        for gate in result.gates:
            _render_gate(gate, style, out)
        _render_measurements(result, out)
        _render_sample(result, out)
        return
    line = quality_line(result)
    if line and result.passed:
        out.item(("quality", "bold"), (line, ""))
    _render_sample(result, out)
    for gate in sorted(result.gates, key=lambda gate: not gate.failed):
        if gate.failed:
            _render_gate(gate, style, out)
        elif gate.status == "skipped":
            out.item((gate.name, "bold"), (gate.summary, "yellow"))
        else:
            _render_warnings(gate, out)
    if not result.passed:
        passed = [gate.name for gate in result.gates if gate.status == "passed"]
        if passed:
            out.item(("passed", "bold"), (", ".join(passed), ""))


def render_verdict(result: Verification, out: Out) -> None:
    """Show the verdict in one line."""
    skipped = f" (not compared: {', '.join(result.skipped)})" if result.skipped else ""
    failures = len(result.failures)
    says_all = result.passed or result.beyond_chosen_limits
    verdict = result.verdict if says_all else f"{result.verdict}, {failures} finding{'s' * (failures != 1)}"
    out.paragraph(("PASSED", "bold green") if result.passed else ("FAILED", "bold red"), (f": {verdict}{skipped}", ""))


def _render_sides(result: Verification, out: Out) -> None:
    out.item(("source", "dim"), (f"{result.source.path} ({result.source.format})", ""))
    out.item(("candidate", "dim"), (_with_types(result.candidate), ""))


def _with_types(side: Side) -> str:
    """Path, format and stored types of a checkpoint."""
    return f"{side.path} ({': '.join(filter(None, (side.format, ', '.join(sorted(side.stored)))))})"


def _render_warnings(gate: GateResult, out: Out) -> None:
    """The findings of a gate that passed, without the notes."""
    for finding in [finding for finding in gate.findings if finding.severity != "note"][:_MAX_WARNINGS]:
        out.item(
            (gate.name, "bold"), (f"{finding.severity}: ", _SEVERITY_STYLES[finding.severity]), (finding.sentence, "")
        )


def render_difference(result: Difference, out: Out, *, findings: int = 4) -> None:
    """Show two checkpoints side by side: the verdict, a line per part, the causes, the tensors that differ most."""
    out.paragraph(("SAME", "bold green") if result.same else ("DIFFERENT", "bold yellow"), (f": {result.verdict}", ""))
    for name, side in (("A  ", result.a), ("B  ", result.b)):
        out.paragraph((name, "bold"), (_with_types(side), ""))
    width = max(len(part.name) for part in result.parts)
    style = _GateStyle(width, findings, _DIFFERENCE_MARKS, {"error": "differs"})
    differing = [tensor for tensor in result.tensors if tensor.differing]
    for part in result.parts:  # the table below has the tensors
        _render_gate(part, replace(style, findings=0) if differing and part.name == "tensors" else style, out)
    if result.causes:
        out.line(("if B was made from A:", "bold"))
    for cause in result.causes:
        _render_cause(cause, out)
    if differing:
        farthest = sorted(differing, key=lambda tensor: -tensor.relative_rmse)[:_MAX_FARTHEST]
        out.table(
            ("tensors farthest apart", "A", "B", "values#", "differing#", "RMS#", "largest#"),
            [
                (
                    tensor.name,
                    *tensor.types,
                    f"{tensor.values:,}",
                    f"{tensor.differing:,}",
                    f"{tensor.relative_rmse:.3g}",
                    f"{tensor.max_abs_difference:.3g}",
                )
                for tensor in farthest
            ],
        )


def _render_gate(gate: GateResult, style: _GateStyle, out: Out) -> None:
    mark, ascii_mark, mark_style = style.marks[gate.status]
    mark = mark if out.can_show(mark) else ascii_mark
    timing = (f" ({gate.timing})", "dim") if gate.timing else ("", "")
    out.paragraph((f"{mark} ", mark_style), (f"{gate.name:<{style.width}}  ", "bold"), (gate.summary, ""), timing)
    findings = [
        finding
        for finding in gate.findings
        if not gate.summary.startswith((finding.message, finding.sentence))
        and (style.notes or finding.severity != "note")
    ]
    notes = [finding for finding in findings if finding.severity == "note"]
    if len(notes) > 3:
        notes = notes[:1]
    shown = [finding for finding in findings if finding.severity != "note" or finding in notes][: style.findings]
    for finding in shown:
        word = style.words.get(finding.severity, finding.severity)
        out.paragraph((f"    {word}: ", _SEVERITY_STYLES[finding.severity]), (finding.sentence, ""))
    hidden = len(findings) - len(shown)
    if hidden and style.findings:
        out.line((f"    and {hidden} more (--json lists them all)", "dim"))


def _render_cause(cause: Cause, out: Out) -> None:
    """Show what went wrong, and the tensors or fields that it explains."""
    out.paragraph(("cause: ", "bold red"), (cause.message, "bold"), (f" [{cause.id}]", "dim"))
    names = (*cause.fields, *by_layers(cause.tensors))
    if names:
        more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        out.paragraph((f"    {', '.join(names[:_MAX_NAMES])}{more}", "dim"))


def by_layers(tensors: Sequence[str]) -> list[str]:
    """The names of tensors; one name for a weight in several layers: "model.layers.{0-5}.mlp.up_proj.weight"."""
    layers: dict[tuple[str, str], list[int]] = {}
    for name in tensors:
        match = _IN_LAYER.fullmatch(name)
        layers.setdefault((match[1], match[3]) if match else (name, ""), []).append(int(match[2]) if match else 0)
    return [f"{start}{_ranges(numbers)}{end}" if end else start for (start, end), numbers in layers.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """ "3" for one number, "{0-2,5}" for several."""
    ordered = sorted(set(numbers))
    if len(ordered) == 1:
        return str(ordered[0])
    firsts = [n for n in ordered if n - 1 not in ordered]
    lasts = [n for n in ordered if n + 1 not in ordered]
    runs = (str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))
    return f"{{{','.join(runs)}}}"


def _render_measurements(result: Verification, out: Out) -> None:
    tensors, distribution = result.metrics("tensors"), result.metrics("distribution")
    if any(row["rmse"] for row in tensors.get("by_type", {}).values()):
        _render_tensor_errors(tensors, out)
    if distribution.get("kl_mean"):
        _render_distribution(distribution, out)


def _render_sample(result: Verification, out: Out) -> None:
    """Show how both sides continue the prompt, once where they write the same."""
    sample = None if result.measurements is None else result.measurements.sample
    if sample is None:
        return
    out.item(("sample", "bold"), (sample.sentence(), ""))
    sides = {"source": sample.source, "candidate": sample.candidate}
    if sample.source == sample.candidate:
        sides = {"both": sample.source}
    end = "".join(sample.prompt[-_PROMPT_END:])
    for side, pieces in sides.items():
        out.item((f"  {side}", "dim"), (f"...{end}", "dim"), ("".join(pieces), ""))


def _render_tensor_errors(metrics: Mapping[str, Any], out: Out) -> None:
    out.table(
        ("stored as", "tensors#", "values#", "RMSE / RMS#", "SNR dB#", "largest error#"),
        [(stored, row["tensors"], f"{row['values']:,}", *_errors(row)) for stored, row in metrics["by_type"].items()],
    )
    lossy = {name: row for name, row in metrics["tensors"].items() if row["rmse"]}
    worst = sorted(lossy, key=lambda name: -lossy[name]["relative_rmse"])[:_MAX_WORST]
    out.table(
        ("worst tensors", "stored as", "RMSE / RMS#", "SNR dB#"),
        [(name, lossy[name]["candidate_type"], *_errors(lossy[name])[:2]) for name in worst],
    )


def _render_distribution(metrics: Mapping[str, Any], out: Out) -> None:
    statistics = (f"{word} {metrics[name]:.3g}" for word, name in _KL_STATISTICS if name in metrics)
    rows = [
        ("KL divergence, nats", "  ".join(statistics)),
        ("same likeliest token", f"{metrics['top1_agreement']:.2%} of {metrics['positions']} positions"),
    ]
    if "perplexity_ratio" in metrics:
        mean, rms = metrics["chosen_probability_change_mean"], metrics["chosen_probability_change_rms"]
        rows += [
            ("perplexity of the source", _plus_minus(metrics, "perplexity_source")),
            ("perplexity of the candidate", _plus_minus(metrics, "perplexity_candidate")),
            ("their ratio", _plus_minus(metrics, "perplexity_ratio")),
            ("chosen token's probability", f"{100 * mean:+.3g} points on average, {100 * rms:.3g} RMS"),
        ]
    out.table(("logits", ""), rows)


def _errors(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return f"{row['relative_rmse']:.3g}", f"{row['snr_db']:.1f}", f"{row['max_abs_error']:.3g}"


def _plus_minus(metrics: Mapping[str, Any], name: str) -> str:
    return f"{metrics[name]:.5g} \u00b1 {metrics[name + '_se']:.2g}"
