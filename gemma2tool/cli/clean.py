"""``gemma2tool clean``: remove what interrupted runs left beside their destinations."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.errors import ResourceError, UsageError


def clean(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A destination that was not finished, or a folder that holds some.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed, and remove nothing.")] = False,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Remove what interrupted runs staged beside PATH and, if it is a folder, directly inside it.

    Finished outputs are not touched. What a running process is working on, and what gemma2tool did not make, is left alone (exit
    code 4).
    """
    from gemma2tool.cli.terminal import Console
    from gemma2tool.receipt.document import receipt_path
    from gemma2tool.storage.staging import clean as staging_clean
    from gemma2tool.storage.units import human_bytes

    console = Console(quiet=quiet, json=json_output)
    found = staging_clean.clean(path, dry_run=dry_run)
    with suppress(UsageError):  # with a name that leaves no room for a receipt's there is none
        found += staging_clean.clean(receipt_path(path), dry_run=dry_run)
    if json_output:
        console.emit_json(
            [
                {
                    "path": str(each.path),
                    "destination": str(each.destination),
                    "bytes": each.nbytes,
                    "in_use": each.in_use,
                    "removed": each.removed,
                    "restored": each.restored,
                    "problem": None if each.problem is None else each.problem.message,
                }
                for each in found
            ]
        )
    for each in found:
        if each.problem is None:
            verb = "would remove" if dry_run else "removed" if each.removed else "could not remove"
            console.print(f"{verb} {each.path}: {human_bytes(each.nbytes)} staged for {each.destination}")
        if each.restored:
            console.print(f"{each.destination}: what was there before has been put back")
    if not found:
        console.print(f"{path}: nothing to remove")
    problems = [each.problem for each in found if each.problem is not None]
    for problem in problems[1:]:
        console.warn(problem.message)
    if problems:
        raise problems[0]
    failed = [each for each in found if not each.removed and not dry_run]
    if failed:
        raise ResourceError("output.staging", f"{failed[0].path}: could not be removed", hint="remove it by hand")
