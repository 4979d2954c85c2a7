"""The Python interface to what makes a file trustworthy; ``gemma2tool.api`` has these functions, too."""

from __future__ import annotations

from pathlib import Path

from gemma2tool.pipeline.scan import run
from gemma2tool.pipeline.scan.finding import ScanFinding, ScanResult

__all__ = ["ScanFinding", "ScanResult", "scan"]


def scan(path: str | Path, *, sarif: str | Path | None = None) -> ScanResult:
    """What the files at ``path`` would do to those who use them: pickles that run code, Keras's Lambda layers, hostile
    chat templates, hidden characters, remote code. Nothing is loaded or run. docs/scan.md lists what is looked for.

    ``sarif``: also write the result to this file, as SARIF 2.1.0. Raises ``InputRefused`` if there is nothing there.
    """
    return run.scan(run.ScanRequest(path=Path(path), sarif=None if sarif is None else Path(sarif)))
