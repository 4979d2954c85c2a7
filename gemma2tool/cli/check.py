"""``gemma2tool check``: is this file sane, without any other to compare it with?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.errors import EXIT_VERIFICATION_FAILED

if TYPE_CHECKING:
    from gemma2tool.api import CheckResult
    from gemma2tool.cli.terminal import Console


_NOT_CHECKED = "the rotary base, the order of rotary dimensions, layers and tokens: verify --reference SOURCE does"


def check(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint, in any format.")],
    perplexity: Annotated[
        bool, typer.Option("--perplexity", help="Also measure the perplexity of the built-in sample text.")
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="Measure the perplexity of this text (UTF-8) instead."),
    ] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Also let the model answer a question.")] = False,
    config: o.ConfigFile = None,
    threads: o.Threads = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Check whether a checkpoint is sane. Its source is not needed; every tensor is read once.

    Values, norms, config, tokenizer, chat template, quantization, known faults of the program that wrote it. Exit code
    0: sane, 1: doubts, 3: cannot be read. docs/check.md lists what is checked.
    """
    from gemma2tool import api
    from gemma2tool.cli.progress import ProgressDisplay
    from gemma2tool.cli.terminal import Console

    console = Console(quiet=quiet, json=json_output)
    result = api.check(
        path,
        perplexity=perplexity,
        text=text,
        sample=sample,
        config=config,
        threads=threads,
        progress=ProgressDisplay(console),
    )
    if json_output:
        console.emit_json(result.to_json())
    _show(result, console)
    if not result.sane:
        raise typer.Exit(EXIT_VERIFICATION_FAILED)


def _show(result: CheckResult, console: Console) -> None:
    """The verdict, then a line for each finding and measurement."""
    from gemma2tool.cli.findings import Shown, show_skipped, show_verdict

    findings = (
        Shown(finding.severity, finding.where, f"{finding.message}; {finding.remedy}", finding.id)
        for finding in result.findings
    )
    stored = ", ".join(name for name, _ in result.stored)
    subject = f"{result.path} ({result.format}: {stored}; {result.parameters:,} parameters)"
    show_verdict(("BROKEN", "DOUBTFUL", "SANE"), ("error", "doubt", "note"), findings, subject, console)
    if result.perplexity is not None:
        console.item(("perplexity", "dim"), (f"{result.perplexity:.5g}", ""))
    if result.sample is not None:
        console.item(("sample", "dim"), (result.sample, ""))
    show_skipped(result.skipped, console)
    if result.sane and not console.quiet:
        console.item(("not checked", "dim"), (_NOT_CHECKED, "dim"))
