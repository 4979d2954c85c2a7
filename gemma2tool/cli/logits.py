"""``gemma2tool logits``: the reference forward pass over a checkpoint of any format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma2tool.cli import options as o


def logits(
    src: o.Source,
    tokens: Annotated[
        Path, typer.Option("--tokens", metavar="FILE", help="Token ids: .npy, integers of shape (T,) or (B, T).")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", help="File for the float32 logits (B, T, V) of all positions (.npy)."),
    ],
    config: o.ConfigFile = None,
    device: o.Device = "cpu",
    threads: o.Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output file.")] = False,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Write the float32 logits of token ids. The built-in forward pass computes them one layer at a time."""
    from gemma2tool import api
    from gemma2tool.cli.terminal import Console

    console = Console(quiet=quiet, json=json_output)
    result = api.logits(src, tokens, out=out, config=config, device=device, threads=threads, force=force)
    if json_output:
        console.emit_json({"out": str(out), "shape": list(result.shape), "dtype": "float32"})
    else:
        console.print(f"{out}: float32 logits {result.shape}")
