"""``gemma2tool verify``: is this file the same model as that one?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.reports import Reports
from gemma2tool.errors import EXIT_VERIFICATION_FAILED


def verify(
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="The checkpoint to judge, in any format.")],
    reference: Annotated[Path, typer.Option("--reference", metavar="SRC", help="The checkpoint it was made from.")],
    tokens: o.Tokens = None,
    text: o.Text = None,
    gate: o.Gate = None,
    config: o.ConfigFile = None,
    threads: o.Threads = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
    *,
    reports: Reports,
) -> None:
    """Compare a checkpoint with the one it was made from: tensors, config, tokenizer, logits. Exit code 1 if a gate fails."""
    from gemma2tool.console import Console
    from gemma2tool.formats import registry
    from gemma2tool.pipeline.evaluate import judge, read_prompts
    from gemma2tool.verify.gates import parse_gates

    console = Console(quiet=quiet, json=json_output)
    given = o.load_config(config)
    with (
        registry.open_checkpoint(reference, config=given) as source,
        registry.open_checkpoint(candidate, config=_fitting(candidate, given)) as made,
    ):
        reports.check((*source.files, *made.files))
        for checkpoint in (source, made):
            for warning in (*checkpoint.warnings, *checkpoint.config.warnings):
                console.warn(f"{checkpoint.path.name}: {warning}")
        result = judge(
            source,
            made,
            ids=read_prompts(tokens, text, source),
            gates=parse_gates(gate or ()),
            threads=threads or o.default_threads(),
            console=console,
        )
    if json_output:
        console.emit_json(result.to_json())
    else:
        console.verification(result)
    reports.write([result], console)
    if not result.passed:
        raise typer.Exit(EXIT_VERIFICATION_FAILED)


def _fitting(candidate: Path, given: object) -> object:
    """``--config`` speaks for weights that come without one; a candidate that carries its own is read with its own."""
    from gemma2tool.formats import registry

    return given if given is not None and registry.detect(candidate).name == "gemma-pytorch" else None
