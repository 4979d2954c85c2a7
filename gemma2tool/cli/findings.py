"""Results that are a verdict and a list of findings, on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gemma2tool.cli.terminal import Console

_STYLES = ("bold red", "bold yellow", "dim")
"""Of severities, the gravest first."""


@dataclass(frozen=True)
class Shown:
    """A finding as it is shown: what it says, and what follows from it."""

    severity: str
    place: str
    message: str
    id: str


def show_verdict(
    words: Sequence[str],
    severities: Sequence[str],
    findings: Iterable[Shown],
    subject: str,
    console: Console,
    *,
    best_style: str = "bold green",
) -> None:
    """The verdict with the number of findings of each severity, then a line for each finding.

    ``words``: the verdict where a finding of the gravest severity is there, where one of the second is, and where there
    is neither. ``severities``: their names, the gravest first; the last is for notes. ``subject``: what was looked at.
    ``best_style``: of the last word.
    """
    findings = list(findings)
    counts = {severity: sum(finding.severity == severity for finding in findings) for severity in severities}
    styles = dict(zip(severities, _STYLES, strict=True))
    grave = next((index for index, severity in enumerate(severities[:-1]) if counts[severity]), len(words) - 1)
    style = _STYLES[grave] if grave < len(words) - 1 else best_style
    counted = [_counted(count, severity) for severity, count in counts.items() if count]
    console.paragraph((words[grave], style), (f": {', '.join(counted) or 'nothing found'} in {subject}", ""))
    for finding in findings:
        console.item(
            (finding.severity, styles[finding.severity]),
            (f"{finding.place}: ", "bold"),
            (f"{finding.message} ", ""),
            (f"[{finding.id}]", "dim"),
        )


def show_skipped(skipped: Mapping[str, str], console: Console) -> None:
    """What was not looked at, and why."""
    for name, reason in skipped.items():
        console.item(("skipped", "dim"), (f"{name}: {reason}", ""))


def _counted(count: int, severity: str) -> str:
    """ "2 errors", "1 doubt", "3 odd"."""
    return f"{count} {severity}{'s' * (severity != 'odd' and count != 1)}"
