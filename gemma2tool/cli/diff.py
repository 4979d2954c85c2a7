"""``gemma2tool diff``: what two checkpoints have in common and what not, whatever their formats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.errors import EXIT_VERIFICATION_FAILED

if TYPE_CHECKING:
    from gemma2tool.model.checkpoint import Checkpoint
    from gemma2tool.model.config import Gemma2Config

_WITHOUT_CONFIG = ("gemma-pytorch", "flax", "maxtext")
"""Formats whose files may come without a config, for which ``--config`` speaks."""


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint, in any format.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another, in any format.")],
    tokens: o.Tokens = None,
    text: o.Text = None,
    no_logits: Annotated[bool, typer.Option("--no-logits", help="Leave out the forward passes.")] = False,
    config: o.ConfigFile = None,
    threads: o.Threads = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Compare two checkpoints, neither of which is the truth: tensors as values, config, tokenizer, logits. Exit code 0 if they are
    the same model, 1 if not."""
    from gemma2tool.cli.terminal import Console
    from gemma2tool.formats import registry
    from gemma2tool.pipeline.evaluate import read_prompts
    from gemma2tool.verify.difference import diff as compare
    from gemma2tool.verify.reports.terminal import render_difference

    console = Console(quiet=quiet, json=json_output)
    given = o.load_config(config)
    with _open(a, given) as left, _open(b, given) as right:
        for side, checkpoint in (("A", left), ("B", right)):
            for warning in (*checkpoint.warnings, *checkpoint.config.warnings):
                console.warn(f"{side}: {warning}")
        result = compare(
            left,
            right,
            ids=read_prompts(tokens, text, left),
            kept=(
                registry.by_name(right.format).kept(left, right),
                registry.by_name(left.format).kept(right, left),
            ),
            logits=not no_logits,
            threads=threads or o.default_threads(),
            progress=console.progress,
        )
    if json_output:
        console.emit_json(result.to_json())
    else:
        render_difference(result, console)
    if not result.same:
        raise typer.Exit(EXIT_VERIFICATION_FAILED)


def _open(path: Path, given: Gemma2Config | None) -> Checkpoint:
    """With the config given where the files may come without one."""
    from gemma2tool.formats import registry

    fits = given is not None and registry.detect(path).name in _WITHOUT_CONFIG
    return registry.open_checkpoint(path, config=given if fits else None)
