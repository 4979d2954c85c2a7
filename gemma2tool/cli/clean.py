"""``gemma2tool clean``: remove what interrupted runs left beside their destinations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.errors import ResourceError

if TYPE_CHECKING:
    from gemma2tool.api import Leftover


def clean(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="An unfinished destination, or a folder that contains some.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed, and remove nothing.")] = False,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Remove what interrupted runs left. It is staged beside PATH and, if PATH is a folder, directly inside it.

    Finished outputs are not touched. What a running process is working on, and files that gemma2tool did not create,
    are left alone (exit code 4).
    """
    from gemma2tool import api
    from gemma2tool.cli.terminal import Console
    from gemma2tool.storage.units import human_bytes

    console = Console(quiet=quiet, json=json_output)
    leftovers = api.clean(path, dry_run=dry_run)
    if json_output:
        console.emit_json([_to_json(leftover) for leftover in leftovers])
    for leftover in leftovers:
        if leftover.problem is None:
            verb = "would remove" if dry_run else "removed" if leftover.removed else "could not remove"
            console.print(f"{verb} {leftover.path}: {human_bytes(leftover.nbytes)} staged for {leftover.destination}")
        if leftover.restored:
            console.print(f"{leftover.destination}: what was there before has been put back")
    if not leftovers:
        console.print(f"{path}: nothing to remove")
    problems = [leftover.problem for leftover in leftovers if leftover.problem is not None]
    for problem in problems[1:]:
        console.warn(problem.message)
    if problems:
        raise problems[0]
    failed = [leftover for leftover in leftovers if not leftover.removed and not dry_run]
    if failed:
        raise ResourceError("output.staging", f"{failed[0].path}: could not be removed", hint="remove it by hand")


def _to_json(leftover: Leftover) -> dict[str, object]:
    return {
        "path": str(leftover.path),
        "destination": str(leftover.destination),
        "bytes": leftover.nbytes,
        "in_use": leftover.in_use,
        "removed": leftover.removed,
        "restored": leftover.restored,
        "problem": None if leftover.problem is None else leftover.problem.message,
    }
