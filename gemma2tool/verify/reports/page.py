"""A verification as one self-contained page of HTML: no script, no network, readable on a phone, printable."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma2tool.verify.finding import GateResult, count_by_severity
from gemma2tool.verify.reports import plots, texts
from gemma2tool.verify.reports.markup import Markup, tag
from gemma2tool.verify.result import Verification
from gemma2tool.version import __version__

MARKS = {"passed": "✓", "failed": "✗", "skipped": "–", "reported": "·"}
MAX_FINDINGS = 200
WORST_TENSORS = 10
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def html(verifications: Sequence[Verification]) -> str:
    """The page, with a part for each verification; equal verifications give equal bytes."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    names = [_name(verification.candidate.path) for verification in verifications]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{'verified' if all(each.passed for each in verifications) else 'FAILED'}: {', '.join(names)}"),
        tag("style", Markup(style)),
    )
    parts = [part for verification in verifications for part in _part(verification)]
    about = f"gemma2tool {__version__}. RMSE / RMS is a tensor's error relative to its own size; KL is in nats, from the source's logits."
    return f'<!doctype html>\n<html lang="en">{head}{tag("body", *parts, tag("footer", about))}</html>\n'


def _part(verification: Verification) -> list[Markup]:
    status = "passed" if verification.passed else "failed"
    source, candidate = verification.source, verification.candidate
    verdict = "Verified: " if verification.passed else "Failed: "
    header = tag(
        "header",
        tag(
            "div",
            tag("h1", tag("b", verdict), verification.verdict),
            tag("p", tag("span", candidate.path, class_="path"), " ", tag("span", _about(candidate), class_="soft")),
            tag(
                "p",
                tag("span", "against " if verification.against_receipt else "made from ", class_="soft"),
                tag("span", source.path, class_="path"),
                " ",
                tag("span", _about(source), class_="soft"),
            ),
            _tiles(verification),
        ),
        class_=status,
    )
    sections = [
        *_causes(verification),
        tag("h2", "Gates"),
        tag("ul", *(_gate(gate) for gate in verification.gates), class_="gates"),
        *_plots(verification),
        *_worst_tensors(verification),
        *_types(verification),
        *_texts(verification),
    ]
    return [header, tag("main", *sections)]


def _about(side: Any) -> str:
    stored = ", ".join(sorted(side.stored, key=lambda name: (-side.stored[name], name)))
    return side.format + (f": {stored}" if stored else "") + (f"; {side.nbytes / 1e6:,.1f} MB" if side.nbytes else "")


def _tiles(verification: Verification) -> Markup:
    spread = _metrics(verification, "distribution")
    tensors = _metrics(verification, "tensors").get("tensors", {})
    tiles = []
    if tensors:
        equal = sum(not row["rmse"] and not row["max_abs_error"] for row in tensors.values())
        tiles.append((f"{equal} of {len(tensors)}", "tensors equal bit for bit"))
    values = sum(verification.candidate.stored.values())
    if verification.candidate.nbytes and values:
        tiles.append((f"{8 * verification.candidate.nbytes / values:.2f}", "bits per weight"))
    if "kl_mean" in spread:
        tiles.append((f"{spread['kl_mean']:.3g}", "mean KL divergence, nats"))
        tiles.append((f"{spread['top1_agreement']:.2%}", f"same likeliest token, {spread['positions']:,} positions"))
    if "perplexity_ratio" in spread:
        tiles.append((f"{spread['perplexity_ratio']:.5g}", f"perplexity ratio, ± {spread['perplexity_ratio_se']:.2g}"))
    return tag(
        "div",
        *(tag("div", tag("b", number), tag("span", words), class_="tile") for number, words in tiles),
        class_="tiles",
    )


def _metrics(verification: Verification, gate: str) -> Mapping[str, Any]:
    return next((each.metrics for each in verification.gates if each.name == gate), {})


def _causes(verification: Verification) -> list[Markup]:
    if not verification.causes:
        return []
    cards = []
    for cause in verification.causes:
        about = [*cause.fields, *cause.tensors]
        names = tag(
            "details",
            tag("summary", f"{len(about)} involved"),
            tag("ul", *(tag("li", name) for name in about[:MAX_FINDINGS])),
        )
        cards.append(
            tag(
                "div",
                tag("strong", cause.message),
                tag("p", cause.id, class_="soft"),
                names if about else None,
                class_="cause",
            )
        )
    return [tag("h2", "What happened"), *cards]


def _gate(gate: GateResult) -> Markup:
    found = [finding for finding in gate.findings if finding.message != gate.summary]
    items = []
    for finding in found[:MAX_FINDINGS]:
        items.append(tag("li", finding.sentence, class_=finding.severity))
    more = [tag("li", f"and {len(found) - MAX_FINDINGS} more")] if len(found) > MAX_FINDINGS else []
    details = (
        tag(
            "details",
            tag("summary", count_by_severity(found)),
            tag("ul", *items, *more),
            open="open" if gate.failed else None,
        )
        if found
        else None
    )
    body = tag(
        "div",
        tag("p", tag("b", gate.name), tag("span", f" {gate.status}", class_="soft")),
        tag("p", gate.summary),
        details,
    )
    return tag("li", tag("span", MARKS[gate.status], class_="mark"), body, class_=gate.status)


def _figure(title: str, words: str, *content: object) -> Markup:
    return tag("figure", tag("figcaption", title, tag("span", words)), *content)


def _plots(verification: Verification) -> list[Markup]:
    measured = verification.measurements
    if measured is None:
        return []
    figures = []
    if measured.tensors:
        grid = measured.grid()
        span = plots.error_range(grid)
        about = "error of every tensor, by layer and kind"
        words = "One cell a tensor, layers downwards; the colour is its error relative to its size."
        figures.append(
            _figure(
                "Error per layer and kind",
                words,
                plots.tensor_map(grid, span, about=about),
                plots.scale_legend(span),
            )
        )
    rest = []
    if (drift := measured.drift) is not None:
        apart = plots.lines(
            [plots.Line("difference", "candidate", drift.relative)],
            x_label="after layer",
            about="relative drift of the hidden state by layer",
        )
        title, words = "Drift of the hidden state", "RMS of the difference over RMS of the source's, after each layer."
        nothing = tag("p", "No difference at any depth.", class_="soft")
        rest.append(_figure(title, words, nothing if apart is None else apart))
        both = [
            plots.Line("source", "source", drift.source_rms),
            plots.Line("candidate", "candidate", drift.candidate_rms),
        ]
        size = plots.lines(both, x_label="after layer", about="size of the hidden state by layer, source and candidate")
        if size is not None:
            rest.append(
                _figure("Size of the hidden state", "RMS after each layer; the lines should lie on each other.", size)
            )
    if measured.tokens is not None:
        kl = measured.tokens.kl[np.isfinite(measured.tokens.kl)]
        if kl.size:
            marks = [
                ("median", float(np.median(kl))),
                ("mean", float(kl.mean())),
                ("99 %", float(np.percentile(kl, 99))),
            ]
            shown = plots.histogram(
                kl, marks, x_label="KL divergence, nats", about="histogram of KL divergence over positions"
            )
            nothing = tag("p", f"0 at all {kl.size:,} positions.", class_="soft")
            words = f"Positions by KL(source, candidate), {kl.size:,} in all."
            rest.append(_figure("KL divergence", words, nothing if shown is None else shown))
    figures += rest
    return [tag("h2", "Where it differs"), tag("div", *figures, class_="plots")] if figures else []


def _worst_tensors(verification: Verification) -> list[Markup]:
    rows = _metrics(verification, "tensors").get("tensors", {})
    worst = sorted(
        (name for name in rows if rows[name]["relative_rmse"]), key=lambda name: (-rows[name]["relative_rmse"], name)
    )[:WORST_TENSORS]
    if not worst:
        return []
    top = rows[worst[0]]["relative_rmse"]
    body = [
        tag(
            "tr",
            tag("td", name, class_="path"),
            tag(
                "td",
                tag("span", class_="gauge", style=f"width: {100 * rows[name]['relative_rmse'] / top:.1f}%"),
                class_="wide",
            ),
            tag("td", f"{rows[name]['relative_rmse']:.3g}", class_="number"),
            tag("td", _decibels(rows[name]["snr_db"]), class_="number"),
            tag("td", f"{rows[name]['max_abs_error']:.3g}", class_="number"),
            tag("td", rows[name]["candidate_type"]),
        )
        for name in worst
    ]
    return [
        tag("h2", "Worst tensors"),
        _table(("tensor", "", "RMSE / RMS#", "SNR dB#", "largest error#", "stored as"), body),
    ]


def _types(verification: Verification) -> list[Markup]:
    rows = _metrics(verification, "tensors").get("by_type", {})
    if not rows:
        return []
    body = [
        tag(
            "tr",
            tag("td", kind),
            tag("td", row["tensors"], class_="number"),
            tag("td", f"{row['values']:,}", class_="number"),
            tag("td", f"{row['relative_rmse']:.3g}", class_="number"),
            tag("td", _decibels(row["snr_db"]), class_="number"),
            tag("td", f"{row['max_abs_error']:.3g}", class_="number"),
        )
        for kind, row in rows.items()
    ]
    return [
        tag("h2", "By stored type"),
        _table(("stored as", "tensors#", "values#", "RMSE / RMS#", "SNR dB#", "largest error#"), body),
    ]


def _decibels(value: float | None) -> str:
    return f"{value:.1f}" if value is not None and math.isfinite(value) else "exact"


def _table(columns: Sequence[str], body: Sequence[Markup]) -> Markup:
    """A column whose name ends in "#" holds numbers."""
    heads = (tag("th", name.removesuffix("#"), class_="number" if name.endswith("#") else None) for name in columns)
    return tag("div", tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *body)), class_="table")


def _texts(verification: Verification) -> list[Markup]:
    tokens = verification.measurements.tokens if verification.measurements is not None else None
    if tokens is None or (worst := texts.worst_tokens(tokens)) is None:
        return []
    words = "The predictions that moved most; the marked token is the one that was to be predicted."
    if not tokens.text:
        words += " The prompt is pseudo-random tokens, not text."
    return [
        tag("h2", "Worst tokens"),
        tag("p", words, class_="soft"),
        worst,
        tag("h2", "The prompt"),
        tag("p", "Underlined by the KL of each token's prediction.", class_="soft"),
        texts.coloured(tokens),
    ]


def _name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
