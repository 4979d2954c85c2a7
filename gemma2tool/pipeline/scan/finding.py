"""What a scan has found, and the result of a whole scan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Severity = Literal["danger", "odd", "note"]
SEVERITIES: tuple[Severity, ...] = ("danger", "odd", "note")
"""Gravest first."""
AS_CHECKPOINT = "the folder as a checkpoint"
"""What is skipped where no reader of a format takes the folder; its files are looked at all the same."""
_NOT_LOOKED_AT = frozenset({"files.unread", "files.pointer", "archive.unread", "archive.too-many", "pickle.too-long"})
"""Findings for what was not looked at."""


@dataclass(frozen=True)
class ScanFinding:
    """One observation.

    - ``severity``: "danger" (harms whoever loads or uses the file), "odd" (no honest file needs it, or it changes what
      is loaded) or "note" (worth knowing).
    - ``file``: the path relative to what was scanned, with "/".
    - ``where``: the part of the file: a member of an archive, a key, a template; empty for the whole file.
    - ``line``: the line of a text file; None otherwise.
    - ``message``: what was seen.
    - ``gain``: what an attacker gains by it.
    - ``remedy``: what to do.
    """

    id: str
    severity: Severity
    file: str
    where: str
    line: int | None
    message: str
    gain: str
    remedy: str

    @property
    def place(self) -> str:
        """The file, the part and the line, for people."""
        line = f":{self.line}" if self.line else ""
        return f"{self.file}{line}" + (f" ({self.where})" if self.where else "")

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "severity": self.severity,
            "file": self.file,
            "where": self.where,
            "line": self.line,
            "message": self.message,
            "gain": self.gain,
            "remedy": self.remedy,
        }


@dataclass(frozen=True)
class ScanResult:
    """What ``scan`` found in a file or folder.

    ``files``: the number of files that were scanned. ``skipped``: the files that were not, and why.
    """

    path: Path
    files: int
    findings: tuple[ScanFinding, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether nothing dangerous or odd was found in what was scanned."""
        return not any(finding.severity != "note" for finding in self.findings)

    @property
    def complete(self) -> bool:
        """Whether there was something to scan, and all of it was scanned."""
        unread = any(finding.id in _NOT_LOOKED_AT for finding in self.findings)
        return self.files > 0 and not unread and not self.skipped.keys() - {AS_CHECKPOINT}

    def count(self, severity: Severity) -> int:
        """Return the number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the result as ``--json`` prints it."""
        return {
            "path": str(self.path),
            "files": self.files,
            "clean": self.clean,
            "complete": self.complete,
            "findings": [finding.to_json() for finding in self.findings],
            "skipped": dict(self.skipped),
        }
