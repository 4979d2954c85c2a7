"""``gemma2tool doctor``: what this machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.terminal import Console
from gemma2tool.errors import EXIT_RESOURCES

_STYLES = {"ok": "", "warning": "yellow", "error": "bold red"}


def doctor(
    path: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where outputs would be written.")] = Path("."),
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Show what a bug report needs. Versions, kernels, processors, memory, disk, extras, GPU. Exit code 4 if something
    is missing that every command needs.
    """
    from gemma2tool import api

    console = Console(quiet=quiet, json=json_output)
    result = api.doctor(path)
    if json_output:
        console.emit_json(result.to_json())
    for fact in result.facts:
        if quiet and fact.status == "ok":
            continue
        remedy = ((f" -> {fact.remedy}", "dim"),) if fact.remedy else ()
        console.item((fact.name, "bold"), (fact.value, _STYLES[fact.status]), *remedy)
    if not result.ok:
        raise typer.Exit(EXIT_RESOURCES)
