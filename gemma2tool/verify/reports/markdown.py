"""Markdown: a summary for a step of CI, and the table of qualities for a model card."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gemma2tool.storage.quoting import one_line
from gemma2tool.verify.finding import GateResult, count_by_severity
from gemma2tool.verify.result import Verification

MARKS = {"passed": "✅", "failed": "❌", "skipped": "➖", "reported": "ℹ️"}
MAX_FINDINGS = 10

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~&@$])")


def escaped(text: object) -> str:
    """``text`` so that Markdown shows it as it is: no markup, no HTML, no link, no mention, on one line."""
    return _SPECIAL.sub(r"\\\1", one_line(text)).replace("://", ":&#47;/").replace("www.", "www&#46;")


def summary(verifications: Sequence[Verification]) -> str:
    """A section for each verification: the verdict, what went wrong, the gates; then the qualities where logits were compared."""
    parts = [_section(verification) for verification in verifications]
    if table := card(verifications):
        parts.append(table)
    return "\n".join(parts)


def _section(verification: Verification) -> str:
    verdict = "✅ verified" if verification.passed else "❌ verification failed"
    candidate, source = verification.candidate, verification.source
    judged = "verified then as" if verification.against_receipt else "judged as"
    lines = [
        f"### {verdict}: {escaped(candidate.path)}",
        "",
        f"{escaped(candidate.format)} against {escaped(source.path)} ({escaped(source.format)}), {judged} {escaped(verification.kind)}.",
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
    found = [finding for finding in gate.findings if finding.severity != "note" and finding.message != gate.summary]
    if not found:
        return []
    lines = [f"<details><summary>{count_by_severity(found)} of {escaped(gate.name)}</summary>", ""]
    for finding in found[:MAX_FINDINGS]:
        lines.append(f"- {finding.severity}: {escaped(finding.sentence)}")
    if len(found) > MAX_FINDINGS:
        lines.append(f"- and {len(found) - MAX_FINDINGS} more")
    return [*lines, "", "</details>", ""]


def card(verifications: Sequence[Verification]) -> str:
    """The table of qualities: bits per weight, KL, top-1 and perplexity of each candidate; empty where no logits were compared."""
    rows = [row for verification in verifications if (row := _row(verification)) is not None]
    if not rows:
        return ""
    count = {spread["positions"] for _, spread in rows}
    over = " and ".join(f"{each:,}" for each in sorted(count))
    about = (
        f"KL divergence from the source's float32 logits in nats, over {over} positions; perplexities with their standard error."
        " Measured by gemma2tool's own forward pass on the files themselves."
    )
    said = [
        "| file | stored as | bits per weight | mean KL | 99 % KL | same top-1 | perplexity | ratio to the source |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        *(_cells(verification, spread) for verification, spread in rows),
        "",
        about,
        "",
    ]
    return "\n".join(said)


def _row(verification: Verification) -> tuple[Verification, dict] | None:
    spread = next((dict(gate.metrics) for gate in verification.gates if gate.name == "distribution"), {})
    return (verification, spread) if "kl_mean" in spread else None


def _cells(verification: Verification, spread: dict) -> str:
    side = verification.candidate
    largest = max(side.stored, key=lambda name: (side.stored[name], name), default="")
    values = sum(side.stored.values())
    bits = f"{8 * side.nbytes / values:.2f}" if values and side.nbytes else ""
    cells = [
        escaped(re.split(r"[/\\]", side.path.rstrip("/\\"))[-1]),
        escaped(largest),
        bits,
        f"{spread['kl_mean']:.3g}",
        f"{spread['kl_p99']:.3g}",
        f"{spread['top1_agreement']:.2%}",
        _plus_minus(spread, "perplexity_candidate"),
        _plus_minus(spread, "perplexity_ratio"),
    ]
    return f"| {' | '.join(cells)} |"


def _plus_minus(spread: dict, name: str) -> str:
    return f"{spread[name]:.5g} ± {spread[name + '_se']:.2g}" if name in spread else ""
