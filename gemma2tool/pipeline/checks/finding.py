"""What a check has found, and the result of all checks together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Severity = Literal["error", "doubt", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "doubt", "note")
"""Gravest first."""


@dataclass(frozen=True)
class CheckFinding:
    """One observation.

    - ``severity``: "error" (the file cannot be right), "doubt" (it is unlikely to be right) or "note" (it can be right,
      but the user should know).
    - ``where``: the tensors, the file or the part of the config.
    - ``message``: what was seen and what it means.
    - ``remedy``: what to do next.
    """

    id: str
    severity: Severity
    where: str
    message: str
    remedy: str

    def to_json(self) -> dict[str, str]:
        return {
            "id": self.id,
            "severity": self.severity,
            "where": self.where,
            "message": self.message,
            "remedy": self.remedy,
        }


@dataclass(frozen=True)
class CheckResult:
    """What ``check`` found in a checkpoint.

    - ``parameters``: the number of values of all tensors. ``stored``: (stored type, number of tensors).
    - ``areas``: what was checked. ``skipped``: an area, or a part of one, and why it was not checked.
    - ``perplexity``: the perplexity of the text, if it was requested.
    - ``sample``: the model's answer, if it was requested.
    """

    path: Path | str
    format: str
    parameters: int
    stored: tuple[tuple[str, int], ...]
    findings: tuple[CheckFinding, ...]
    areas: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    perplexity: float | None = None
    sample: str | None = None

    @property
    def sane(self) -> bool:
        """Whether there is no error and no doubt."""
        return not any(finding.severity != "note" for finding in self.findings)

    def count(self, severity: Severity) -> int:
        """Return the number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the result as ``--json`` prints it."""
        return {
            "path": str(self.path),
            "format": self.format,
            "parameters": self.parameters,
            "stored": dict(self.stored),
            "sane": self.sane,
            "findings": [finding.to_json() for finding in self.findings],
            "areas": list(self.areas),
            "skipped": dict(self.skipped),
            "perplexity": self.perplexity,
            "sample": self.sample,
        }
