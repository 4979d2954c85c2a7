"""``gemma2tool merge``: one result from the parts that shards wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma2tool.cli import options as o


def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write: the OUT of the shards' runs.")],
    parts: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[PART]...", help="The parts of all shards. Default: OUT.shard-*-of-* beside OUT."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Merge the parts that 'imatrix' or 'calibrate' wrote with --shard; the result is what one machine writes."""
    from gemma2tool import api
    from gemma2tool.cli.terminal import Console

    console = Console(quiet=quiet, json=json_output)
    result = api.merge(out, parts or (), force=force)
    if json_output:
        console.emit_json(result.to_json())
    console.print(f"{out}: {result.kind} of {len(result.parts)} parts")
