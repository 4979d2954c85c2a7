"""``gemma2tool scan``: what would these files do to whoever uses them?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.errors import EXIT_VERIFICATION_FAILED

if TYPE_CHECKING:
    from gemma2tool.api import ScanResult
    from gemma2tool.cli.terminal import Console


def scan(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A file or a folder; any model, not only a Gemma 2.")],
    sarif: Annotated[
        Path | None,
        typer.Option("--sarif", metavar="FILE", help="Write the findings as SARIF 2.1.0; replaces FILE."),
    ] = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Look for dangers in a model's files. Nothing is loaded, unpacked or run.

    Pickles, archives, Keras layers, chat templates, hidden characters, remote code, files that loaders act on. Exit
    code 0: nothing found in what was read, 1: something is dangerous or odd, 3: nothing there. The verdict is
    INCOMPLETE instead of CLEAN where something could not be read. docs/scan.md lists what is looked for.
    """
    from gemma2tool import api
    from gemma2tool.cli.terminal import Console

    console = Console(quiet=quiet, json=json_output)
    result = api.scan(path, sarif=sarif)
    if json_output:
        console.emit_json(result.to_json())
    _show(result, console)
    if not result.clean:
        raise typer.Exit(EXIT_VERIFICATION_FAILED)


def _show(result: ScanResult, console: Console) -> None:
    """The verdict, then a line for each finding."""
    from gemma2tool.cli.findings import Shown, show_skipped, show_verdict

    findings = (
        Shown(
            finding.severity,
            finding.place,
            f"{finding.message}{f': {finding.gain}' if finding.gain else ''}; {finding.remedy}",
            finding.id,
        )
        for finding in result.findings
    )
    subject = f"{result.files} file{'s' * (result.files != 1)} of {result.path}"
    best, style = ("CLEAN", "bold green") if result.complete else ("INCOMPLETE", "bold yellow")
    if not result.complete:
        subject += ", not all of which could be read"
    words = ("DANGEROUS", "ODD", best)
    show_verdict(words, ("danger", "odd", "note"), findings, subject, console, best_style=style)
    show_skipped(result.skipped, console)
