"""``gemma2tool run``: what a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.conversion import show_plans
from gemma2tool.cli.outcome import show_results
from gemma2tool.cli.progress import ProgressDisplay
from gemma2tool.cli.sharding import rank_of_torchrun
from gemma2tool.cli.terminal import Console
from gemma2tool.errors import EXIT_VERIFICATION_FAILED, UsageError


def run(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A YAML file: sources, outputs and their options; docs/recipes.md.")
    ],
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="WHERE",
            help="'ray': on the Ray cluster at RAY_ADDRESS or on this machine, one task per output; extra [ray].",
        ),
    ] = None,
    force: o.Force = False,
    dry_run: o.DryRun = False,
    tensors: o.Tensors = False,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Convert and quantize as a recipe says."""
    from gemma2tool import api

    console = Console(quiet=quiet, json=json_output)
    if on not in (None, "ray"):
        raise UsageError("option.choice", f"--on {on!r} is not a choice", hint="write --on ray")
    if rank_of_torchrun() > 0:
        return  # rank 0 runs the recipe
    runs = api.read_recipe(recipe, force=force, existing=on is not None)
    if dry_run:
        show_plans([plan for one in runs for plan in api.plan(one)], console, tensors=tensors)
        return
    contents, written = [], True
    if on is not None:
        batches = iter([api.run_on_ray(runs, progress=ProgressDisplay(console))])
    else:
        batches = (api.run(one, progress=ProgressDisplay(console)) for one in runs)
    for results in batches:
        contents += [result.to_json() for result in results]
        show_results(results, console, verbose=verbose)
        written &= all(result.written for result in results)
    if json_output:
        console.emit_json({"outputs": contents})
    if not written:
        raise typer.Exit(EXIT_VERIFICATION_FAILED)
