"""``gemma2tool clean``: remove what interrupted runs left beside their destinations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.errors import ResourceError


def clean(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A destination that was not finished, or a folder that holds some.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed, and remove nothing.")] = False,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Remove what interrupted runs staged beside PATH and, if it is a folder, directly inside it.

    Finished outputs are not touched. What a running process is working on is left alone (exit code 4).
    """
    from gemma2tool.console import Console, human_bytes
    from gemma2tool.storage import staging_clean
    from gemma2tool.verify.receipt import receipt_path

    console = Console(quiet=quiet, json=json_output)
    found = staging_clean.clean(path, dry_run=dry_run) + staging_clean.clean(receipt_path(path), dry_run=dry_run)
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
                }
                for each in found
            ]
        )
    for each in found:
        if not each.in_use:
            verb = "would remove" if dry_run else "removed" if each.removed else "could not remove"
            console.print(f"{verb} {each.path}: {human_bytes(each.nbytes)} staged for {each.destination}")
        if each.restored:
            console.print(f"{each.destination}: what was there before has been put back")
    if not found:
        console.print(f"{path}: nothing to remove")
    failed = [each for each in found if not each.removed and not dry_run]
    if busy := [each for each in found if each.in_use]:
        raise ResourceError(
            "output.locked",
            f"{busy[0].destination}: a process is writing this output, so {busy[0].path} was left alone",
            hint="wait for it, or end it",
        )
    if failed:
        raise ResourceError("output.staging", f"{failed[0].path}: could not be removed", hint="remove it by hand")
