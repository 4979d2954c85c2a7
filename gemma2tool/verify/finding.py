"""Findings, and the outcome of one gate: what every comparison returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gemma2tool.verify.json_values import json_value

Severity = Literal["error", "warning", "note"]
Status = Literal["passed", "failed", "skipped", "reported"]

Sides = tuple[str, str]
"""The names of the two checkpoints in sentences."""

SIDES: Sides = ("source", "candidate")


def the(side: str) -> str:
    """A side in a sentence: "the source", but "A"."""
    return side if len(side) == 1 else f"the {side}"


@dataclass(frozen=True)
class Finding:
    """One observation, in a sentence.

    - ``severity``: "error" (the models differ where they must not), "warning" (they differ where it may matter) or
      "note" (the conversion itself requires the difference).
    - ``subject``: the canonical tensor name or the config field that the finding concerns; None for the whole model.
    """

    gate: str
    severity: Severity
    subject: str | None
    message: str

    @property
    def sentence(self) -> str:
        """The message, preceded by its subject unless it already starts with it."""
        if not self.subject or self.message.startswith(self.subject):
            return self.message
        return f"{self.subject}: {self.message}"

    def to_json(self) -> dict[str, Any]:
        return {"gate": self.gate, "severity": self.severity, "subject": self.subject, "message": self.message}


def count_by_severity(findings: Iterable[Finding]) -> str:
    """The number of findings of each severity, in words: "2 errors, 1 note"."""
    counts = Counter(finding.severity for finding in findings)
    severities: tuple[Severity, ...] = ("error", "warning", "note")
    return ", ".join(
        f"{counts[severity]} {severity}{'s' * (counts[severity] != 1)}" for severity in severities if counts[severity]
    )


@dataclass(frozen=True)
class GateResult:
    """The outcome of one gate.

    - ``status``: "passed", "failed", "reported" (the gate measures but has no limit) or "skipped" (it did not run;
      ``summary`` says why).
    - ``metrics``: measurements by name: numbers, strings or nested mappings of these.
    - ``timing``: a remark on the time the gate took, if it is worth one; not part of ``to_json``.
    """

    name: str
    status: Status
    summary: str
    metrics: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    timing: str = field(default="", compare=False)

    @property
    def failed(self) -> bool:
        return self.status == "failed"

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "status": self.status,
            "summary": self.summary,
            "metrics": json_value(self.metrics),
            "findings": [finding.to_json() for finding in self.findings],
        }
