"""``gemma2tool inspect``: what a checkpoint is, from its headers alone."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Annotated

import typer

from gemma2tool.cli import options as o


def inspect(
    src: o.Source,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    config: o.ConfigFile = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Show format, config and tensors of a checkpoint; reads headers only."""
    from gemma2tool.cli.terminal import Console
    from gemma2tool.formats import registry

    console = Console(quiet=quiet, json=json_output)
    with registry.open_checkpoint(src, config=o.load_config(config)) as checkpoint:
        stored: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for tensor in checkpoint.tensors.values():
            stored[tensor.stored][0] += 1
            stored[tensor.stored][1] += tensor.size
        summary = {
            "path": str(src),
            "format": checkpoint.format,
            "size": checkpoint.config.size_name,
            "parameters": sum(tensor.size for tensor in checkpoint.tensors.values()),
            "stored": {name: {"tensors": count, "values": size} for name, (count, size) in sorted(stored.items())},
            "assets": sorted(checkpoint.assets),
            "warnings": [*checkpoint.warnings, *checkpoint.config.warnings],
            "config": checkpoint.config.to_hf(),
        }
        listed = [
            (name, list(checkpoint.tensors[name].shape), checkpoint.tensors[name].stored) for name in checkpoint.specs
        ]
    if json_output:
        if tensors:
            summary["tensors"] = [{"name": name, "shape": shape, "stored": kind} for name, shape, kind in listed]
        console.emit_json(summary)
        return
    released = f", released size {summary['size']}" if summary["size"] else ""
    rows = [("path", str(src)), ("format", checkpoint.format), ("parameters", f"{summary['parameters']:,}{released}")]
    rows += [
        (f"stored as {name}", f"{count} tensors, {size:,} values") for name, (count, size) in sorted(stored.items())
    ]
    rows.append(("travels along", ", ".join(sorted(checkpoint.assets)) or "nothing"))
    hidden = ("id2label", "label2id")
    rows += [(key, json.dumps(value)) for key, value in sorted(summary["config"].items()) if key not in hidden]
    for key, value in rows:
        console.print(f"{key:<30} {value}")
    for warning in summary["warnings"]:
        console.warn(warning)
    if tensors:
        console.table(
            ("tensor", "shape", "stored"), [(name, "x".join(map(str, shape)), kind) for name, shape, kind in listed]
        )
