"""``gemma2tool diff``: how two checkpoints of any formats differ."""

from __future__ import annotations

from typing import Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.errors import EXIT_VERIFICATION_FAILED


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint, in any format.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another checkpoint, in any format.")],
    tokens: o.Tokens = None,
    text: o.Text = None,
    no_logits: Annotated[bool, typer.Option("--no-logits", help="Skip the forward passes.")] = False,
    config: o.ConfigFile = None,
    threads: o.Threads = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Compare any two checkpoints. Tensors as values, config, tokenizer, logits; neither side is the reference.

    Exit code 0 if they are the same model, 1 if not.
    """
    from gemma2tool import api
    from gemma2tool.cli.progress import ProgressDisplay
    from gemma2tool.cli.terminal import Console
    from gemma2tool.verify.reports.terminal import render_difference

    console = Console(quiet=quiet, json=json_output)
    result = api.diff(
        a,
        b,
        tokens=tokens,
        text=text,
        with_logits=not no_logits,
        config=config,
        threads=threads,
        progress=ProgressDisplay(console),
    )
    if json_output:
        console.emit_json(result.to_json())
    render_difference(result, console)
    if not result.same:
        raise typer.Exit(EXIT_VERIFICATION_FAILED)
