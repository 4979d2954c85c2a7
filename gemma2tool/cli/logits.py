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
        typer.Option("--out", metavar="FILE", help="Where the float32 logits (B, T, V) of all positions go (.npy)."),
    ],
    config: o.ConfigFile = None,
    device: o.Device = "cpu",
    threads: o.Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output file.")] = False,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Write the float32 logits of every position, computed one layer at a time by the built-in forward pass."""
    from gemma2tool.cli.terminal import Console
    from gemma2tool.formats import registry
    from gemma2tool.pipeline.evaluate import read_tokens, write_logits
    from gemma2tool.storage.paths import refuse_same

    console = Console(quiet=quiet, json=json_output)
    with registry.open_checkpoint(src, config=o.load_config(config)) as checkpoint:
        refuse_same((*checkpoint.files, tokens), out)
        for warning in (*checkpoint.warnings, *checkpoint.config.warnings):
            console.warn(warning)
        ids = read_tokens(tokens, checkpoint.config)
        shape = write_logits(
            checkpoint, ids, out, force=force, threads=threads or o.default_threads(), device=o.check_device(device)
        )
    if json_output:
        console.emit_json({"out": str(out), "shape": list(shape), "dtype": "float32"})
    else:
        console.print(f"{out}: float32 logits {shape}")
