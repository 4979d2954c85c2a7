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

_STYLES = {"danger": "bold red", "odd": "bold yellow", "note": "dim"}


def scan(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A file or a folder; any model, not only a Gemma 2.")],
    sarif: Annotated[
        Path | None,
        typer.Option("--sarif", metavar="FILE", help="Write the findings as SARIF 2.1.0; replaces FILE."),
    ] = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Look for what is dangerous in a model's files, without loading, unpacking or running anything.

    Pickles, archives, Keras layers, chat templates, hidden characters, remote code, files that loaders act on. Exit
    code 0: clean, 1: something is dangerous or odd, 3: nothing there. docs/scan.md lists what is looked for.
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
    word, style = ("CLEAN", "bold green") if result.clean else ("ODD", _STYLES["odd"])
    if result.count("danger"):
        word, style = "DANGEROUS", _STYLES["danger"]
    counts = [
        f"{count} {severity}{'s' * (severity != 'odd' and count != 1)}"
        for severity in ("danger", "odd", "note")
        if (count := result.count(severity))
    ]
    files = f"{result.files} file{'s' * (result.files != 1)}"
    console.line((word, style), (f": {', '.join(counts) or 'nothing found'} in {files} of {result.path}", ""))
    for finding in result.findings:
        gain = f": {finding.gain}" if finding.gain else ""
        console.item(
            (finding.severity, _STYLES[finding.severity]),
            (f"{finding.place}: ", "bold"),
            (f"{finding.message}{gain}; {finding.remedy} ", ""),
            (f"[{finding.id}]", "dim"),
        )
    for name, reason in result.skipped.items():
        console.item(("skipped", "dim"), (f"{name}: {reason}", ""))
