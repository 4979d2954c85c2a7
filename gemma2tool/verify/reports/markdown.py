"""Markdown: a summary for a CI step, and the quality table for a model card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gemma2tool.storage.quoting import one_line
from gemma2tool.verify.finding import GateResult, count_by_severity
from gemma2tool.verify.result import Failure, Result, Verification

MARKS = {"passed": "\u2705", "failed": "\u274c", "skipped": "\u2796", "reported": "\u2139\ufe0f"}
MAX_FINDINGS = 10

_SPECIAL = re.compile(r"([\\`*{}\[\]<>|~&@$]|(?<![^\W_])_|_(?![^\W_]))")  # an underscore inside a word is one anyway


def escaped(text: object) -> str:
    """``text`` as Markdown that shows it literally: no markup, HTML, links or mentions, on one line."""
    return _SPECIAL.sub(r"\\\1", one_line(text)).replace("://", ":&#47;/").replace("www.", "www&#46;")


def summary(results: Sequence[Result]) -> str:
    """A section per verification (verdict, causes, gates, findings), or for what has none, and the quality table where
    logits were compared.
    """
    parts = [_failure(result) if isinstance(result, Failure) else _section(result) for result in results]
    if table := card([result for result in results if isinstance(result, Verification)]):
        parts.append(table)
    return "\n".join(parts)


def _failure(failure: Failure) -> str:
    subject = f": {escaped(failure.path)}" if failure.subject else ""
    lines = [f"### \u274c {escaped(failure.command)} has no result{subject}", ""]
    lines += [f"> **{escaped(failure.message)}** ({escaped(failure.id)}, exit code {failure.exit_code})"]
    lines += [">", f"> {escaped(failure.hint)}"] if failure.hint else []
    return "\n".join([*lines, ""])


def _section(verification: Verification) -> str:
    verdict = "✅ verified" if verification.passed else "❌ verification failed"
    candidate, source = verification.candidate, verification.source
    verified_as = "verified then as" if verification.against_receipt else "verified as"
    lines = [
        f"### {verdict}: {escaped(candidate.path)}",
        "",
        f"{escaped(candidate.format)} against {escaped(source.path)} ({escaped(source.format)}),"
        f" {verified_as} {escaped(verification.kind)}.",
        "",
    ]
    for cause in verification.causes:
        lines += [f"> **{escaped(cause.message)}** ({escaped(cause.id)})", ">"]
    if verification.causes:
        lines[-1] = ""
    lines += ["| | gate | result |", "|---|---|---|"]
    lines += [
        f"| {MARKS[gate.status]} | {escaped(gate.name)} | {escaped(gate.summary)} |" for gate in verification.gates
    ]
    lines.append("")
    for gate in verification.gates:
        lines += _findings(gate)
    return "\n".join(lines)


def _findings(gate: GateResult) -> list[str]:
    """Errors and warnings of a gate, folded."""
    findings = [finding for finding in gate.findings if finding.severity != "note" and finding.message != gate.summary]
    if not findings:
        return []
    lines = [f"<details><summary>{count_by_severity(findings)} of {escaped(gate.name)}</summary>", ""]
    lines += [f"- {finding.severity}: {escaped(finding.sentence)}" for finding in findings[:MAX_FINDINGS]]
    if len(findings) > MAX_FINDINGS:
        lines.append(f"- and {len(findings) - MAX_FINDINGS} more")
    return [*lines, "", "</details>", ""]


def card(verifications: Sequence[Verification]) -> str:
    """The quality table: bits per weight, KL, top-1 and perplexity of each candidate; "" where no logits were
    compared."""
    measured = [
        (verification, metrics)
        for verification in verifications
        if "kl_mean" in (metrics := verification.metrics("distribution"))
    ]
    if not measured:
        return ""
    positions = " and ".join(f"{count:,}" for count in sorted({metrics["positions"] for _, metrics in measured}))
    return "\n".join(
        [
            "| file | stored as | bits per weight | mean KL | 99 % KL | same top-1 | perplexity | ratio to the "
            "source |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
            *(_row(verification, metrics) for verification, metrics in measured),
            "",
            f"KL divergence from the source's float32 logits in nats, over {positions} positions; perplexities with "
            "their standard error. Measured by gemma2tool's own forward pass on the files themselves.",
            "",
        ]
    )


def _row(verification: Verification, metrics: Mapping[str, Any]) -> str:
    candidate = verification.candidate
    main_type = max(candidate.stored, key=lambda name: (candidate.stored[name], name), default="")
    bits = candidate.bits_per_weight
    cells = [
        escaped(re.split(r"[/\\]", candidate.path.rstrip("/\\"))[-1]),
        escaped(main_type),
        "" if bits is None else f"{bits:.2f}",
        f"{metrics['kl_mean']:.3g}",
        f"{metrics['kl_p99']:.3g}",
        f"{metrics['top1_agreement']:.2%}",
        _plus_minus(metrics, "perplexity_candidate"),
        _plus_minus(metrics, "perplexity_ratio"),
    ]
    return f"| {' | '.join(cells)} |"


def _plus_minus(metrics: Mapping[str, Any], name: str) -> str:
    """A value with its standard error; "" where it was not measured."""
    return f"{metrics[name]:.5g} ± {metrics[name + '_se']:.2g}" if name in metrics else ""
