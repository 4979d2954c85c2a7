"""``gemma2tool inspect``: what a checkpoint is, from its headers alone."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gemma2tool.cli import options as o

_HIDDEN = ("id2label", "label2id")


def inspect(
    src: o.Source,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    config: o.ConfigFile = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Show format, config and tensors of a checkpoint; reads headers only."""
    from gemma2tool import api
    from gemma2tool.cli.terminal import Console

    console = Console(quiet=quiet, json=json_output)
    result = api.inspect(src, config=config)
    if json_output:
        console.emit_json(result.to_json(tensors=tensors))
        return
    released = f", released size {result.size}" if result.size else ""
    rows = [("path", str(src)), ("format", result.format), ("parameters", f"{result.parameters:,}{released}")]
    rows += [(f"stored as {name}", f"{count} tensors, {values:,} values") for name, count, values in result.stored]
    rows.append(("travels along", ", ".join(result.assets) or "nothing"))
    rows += [(key, json.dumps(value)) for key, value in sorted(result.config.items()) if key not in _HIDDEN]
    for key, value in rows:
        console.print(f"{key:<30} {value}")
    for warning in result.warnings:
        console.warn(warning)
    if tensors:
        lines = [(name, "x".join(map(str, shape)), stored) for name, shape, stored in result.tensors]
        console.table(("tensor", "shape", "stored"), lines)
