"""A verification as a self-contained HTML page: no scripts, no network access, readable on a phone, printable."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from gemma2tool.model.lazy import Array
from gemma2tool.verify.compare.measurements import Drift, Measurements
from gemma2tool.verify.finding import GateResult, count_by_severity
from gemma2tool.verify.reports import plots, tensor_map, texts
from gemma2tool.verify.reports.document import document
from gemma2tool.verify.reports.headline import headline, kl_scale
from gemma2tool.verify.reports.markup import Markup, tag
from gemma2tool.verify.reports.tables import figure, table
from gemma2tool.verify.result import Failure, Result, Verification
from gemma2tool.version import __version__

MARKS = {"passed": "✓", "failed": "✗", "skipped": "\u2013", "reported": "·"}
MAX_FINDINGS = 200
WORST_TENSORS = 10


def html(results: Sequence[Result], sections: Sequence[Markup] = ()) -> str:
    """The page, with a part per verification, or for what has none; equal results give equal bytes. ``sections``: more
    about the last one, before its measurements.
    """
    names, parts = [], list[Markup]()
    for result in results:
        if isinstance(result, Failure):
            names.append(result.path or result.command)
            parts += _failure(result)
        else:
            names.append(_name(result.candidate.path))
            parts += _part(result, sections if result is results[-1] else ())
    footer = f"gemma2tool {__version__}."
    if measured := [result for result in results if isinstance(result, Verification)]:
        footer += (
            " RMSE / RMS is a tensor's error relative to its own size; KL is in nats, relative to the source's logits."
        )
    passed = all(result.passed for result in results)
    verdict = "verified" if passed else "FAILED" if measured else "NO RESULT"
    return document(f"{verdict}: {', '.join(names)}", tag("main", *parts), tag("footer", footer))


def _failure(failure: Failure) -> list[Markup]:
    lines = [
        tag("h1", tag("b", "No result: "), f"{failure.command} ended with exit code {failure.exit_code}"),
        tag("p", tag("span", failure.path, class_="path")),
        tag("p", f"{failure.message} [{failure.id}]"),
        tag("p", failure.hint, class_="soft"),
    ]
    return [tag("header", tag("div", *lines), class_="failed")]


def _part(verification: Verification, more: Sequence[Markup]) -> list[Markup]:
    sections = [
        *_causes(verification),
        tag("h2", "Gates"),
        tag("ul", *(_gate(gate, bool(verification.causes)) for gate in verification.gates), class_="gates"),
        *kl_scale(verification),
        *_sample(verification),
        *more,
        *_plots(verification),
        *_worst_tensors(verification),
        *_types(verification),
        *_texts(verification),
    ]
    return [headline(verification), tag("div", *sections, class_="part")]


def _causes(verification: Verification) -> list[Markup]:
    if not verification.causes:
        return []
    cards = []
    for cause in verification.causes:
        names = [*cause.fields, *cause.tensors]
        details = tag(
            "details",
            tag("summary", f"{len(names)} affected"),
            tag("ul", *(tag("li", name) for name in names[:MAX_FINDINGS])),
        )
        cards.append(
            tag(
                "div",
                tag("strong", cause.message),
                tag("p", cause.id, class_="soft"),
                details if names else None,
                class_="cause",
            )
        )
    return [tag("h2", "What happened"), *cards]


def _gate(gate: GateResult, is_explained: bool) -> Markup:
    """A gate with its findings, which are folded away where causes explain them."""
    findings = [finding for finding in gate.findings if finding.message != gate.summary]
    items = [tag("li", finding.sentence, class_=finding.severity) for finding in findings[:MAX_FINDINGS]]
    if len(findings) > MAX_FINDINGS:
        items.append(tag("li", f"and {len(findings) - MAX_FINDINGS} more"))
    details = None
    if findings:
        summary = tag("summary", count_by_severity(findings))
        details = tag("details", summary, tag("ul", *items), open="open" if gate.failed and not is_explained else None)
    body = tag(
        "div",
        tag("p", tag("b", gate.name), tag("span", f" {gate.status}", class_="soft")),
        tag("p", gate.summary),
        details,
    )
    return tag("li", tag("span", MARKS[gate.status], class_="mark"), body, class_=gate.status)


# -- plots -------------------------------------------------------------------------------------------------------------


def _plots(verification: Verification) -> list[Markup]:
    measurements = verification.measurements
    if measurements is None:
        return []
    figures = _tensor_figures(measurements)
    if measurements.drift is not None:
        figures += _drift_figures(measurements.drift)
    if measurements.tokens is not None:
        figures += _kl_figures(measurements.tokens.kl[np.isfinite(measurements.tokens.kl)])
    return [tag("h2", "Where it differs"), tag("div", *figures, class_="plots")] if figures else []


def _tensor_figures(measurements: Measurements) -> list[Markup]:
    if not measurements.tensors:
        return []
    grid = tensor_map.inexact_kinds(measurements.grid())
    if not grid:
        return []
    span = tensor_map.error_range(grid)
    drawing = tensor_map.tensor_map(grid, span, title="error of the tensors that are not equal, by layer and kind")
    caption = "One cell per tensor, layers downwards; the color is the tensor's error relative to its size."
    hidden = len(measurements.tensors) - len(grid)
    if hidden:
        caption += f" Kinds that are equal bit for bit in every layer are left out ({hidden} tensors)."
    return [figure("Error per layer and kind", caption, drawing, tensor_map.scale_legend(span))]


def _drift_figures(drift: Drift) -> list[Markup]:
    figures = []
    difference = plots.lines(
        [plots.Line("difference", "candidate", drift.relative)],
        x_label="after layer",
        title="relative drift of the hidden state by layer",
    )
    caption = "RMS of the difference over RMS of the source's hidden state, after each layer."
    nothing = tag("p", "No difference at any depth.", class_="soft")
    figures.append(figure("Drift of the hidden state", caption, nothing if difference is None else difference))
    sizes = plots.lines(
        [
            plots.Line("source", "source", drift.source_rms),
            plots.Line("candidate", "candidate", drift.candidate_rms),
        ],
        x_label="after layer",
        title="size of the hidden state by layer, source and candidate",
    )
    if sizes is not None:
        caption = "RMS after each layer; the two lines should coincide."
        figures.append(figure("Size of the hidden state", caption, sizes))
    return figures


def _kl_figures(kl: Array) -> list[Markup]:
    if not kl.size:
        return []
    marks = [("median", float(np.median(kl))), ("mean", float(kl.mean())), ("99 %", float(np.percentile(kl, 99)))]
    drawing = plots.histogram(
        kl, marks, x_label="KL divergence, nats", title="histogram of KL divergence over positions"
    )
    nothing = tag("p", f"0 at all {kl.size:,} positions.", class_="soft")
    caption = f"Positions by KL(source, candidate), {kl.size:,} in all."
    return [figure("KL divergence", caption, nothing if drawing is None else drawing)]


# -- tables and texts --------------------------------------------------------------------------------------------------


def _worst_tensors(verification: Verification) -> list[Markup]:
    rows = verification.metrics("tensors").get("tensors", {})
    worst = sorted(
        (name for name in rows if rows[name]["relative_rmse"]), key=lambda name: (-rows[name]["relative_rmse"], name)
    )[:WORST_TENSORS]
    if not worst:
        return []
    top = rows[worst[0]]["relative_rmse"]
    body = [
        (
            tag("span", name, class_="path"),
            tag("span", class_="gauge", style=f"width: {100 * rows[name]['relative_rmse'] / top:.1f}%"),
            f"{rows[name]['relative_rmse']:.3g}",
            _decibels(rows[name]["snr_db"]),
            f"{rows[name]['max_abs_error']:.3g}",
            rows[name]["candidate_type"],
        )
        for name in worst
    ]
    columns = ("tensor", "beside the worst|", "RMSE / RMS#", "SNR dB#", "largest error#", "stored as")
    return [tag("h2", "Worst tensors"), table(columns, body)]


def _types(verification: Verification) -> list[Markup]:
    rows = verification.metrics("tensors").get("by_type", {})
    if not rows:
        return []
    body = [
        (
            stored,
            row["tensors"],
            f"{row['values']:,}",
            f"{row['relative_rmse']:.3g}",
            _decibels(row["snr_db"]),
            f"{row['max_abs_error']:.3g}",
        )
        for stored, row in rows.items()
    ]
    columns = ("stored as", "tensors#", "values#", "RMSE / RMS#", "SNR dB#", "largest error#")
    return [tag("h2", "By stored type"), table(columns, body)]


def _decibels(value: float | None) -> str:
    return f"{value:.1f}" if value is not None and math.isfinite(value) else "exact"


def _sample(verification: Verification) -> list[Markup]:
    measurements = verification.measurements
    if measurements is None or measurements.sample is None:
        return []
    caption = f"Greedy, from the beginning of the prompt: {measurements.sample.sentence()}."
    if measurements.tokens is not None and not measurements.tokens.text:
        caption += " The prompt consists of pseudo-random tokens, not text."
    return [
        tag("h2", "What the two write"),
        tag("p", caption, class_="soft"),
        texts.continuations(measurements.sample),
    ]


def _texts(verification: Verification) -> list[Markup]:
    tokens = verification.measurements.tokens if verification.measurements is not None else None
    if tokens is None or (worst := texts.worst_tokens(tokens)) is None:
        return []
    caption = "The predictions that differ most; the marked token is the one to be predicted."
    if not tokens.text:
        caption += " The prompt consists of pseudo-random tokens, not text."
    return [
        tag("h2", "Worst tokens"),
        tag("p", caption, class_="soft"),
        worst,
        tag("h2", "The prompt"),
        tag("p", "Underlined by the KL of each token's prediction.", class_="soft"),
        texts.colored_prompt(tokens),
    ]


def _name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
