"""``gemma2tool imatrix``: an importance matrix from a text, for ``quantize --imatrix`` and llama-quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.sharding import ShardOption, shard_of


def imatrix(
    src: o.Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The importance matrix to write (.gguf).")],
    text: Annotated[
        Path,
        typer.Option("--text", metavar="FILE", help="Text to run (UTF-8), similar to what the model will be used for."),
    ],
    chunk: Annotated[int, typer.Option("--chunk", min=16, help="Tokens per chunk.")] = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, help="Stop after this many chunks. Default: the whole text.")
    ] = None,
    output_weights: Annotated[
        bool,
        typer.Option(
            "--output-weights", help="Also collect the output head; a tied embedding is then quantized with it."
        ),
    ] = False,
    shard: ShardOption = None,
    config: o.ConfigFile = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    dry_run: o.DryRun = False,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Collect an importance matrix from a text. The built-in forward pass runs layer by layer, on a checkpoint of any
    format.
    """
    from gemma2tool import api
    from gemma2tool.cli.needs import show_needs
    from gemma2tool.cli.progress import ProgressDisplay
    from gemma2tool.cli.terminal import Console

    console = Console(quiet=quiet, json=json_output)
    options = api.ImatrixOptions(
        chunk_size=chunk,
        max_chunks=chunks,
        output_weights=output_weights,
        shard=shard_of(shard),
        force=force,
        threads=threads or api.default_threads(),
        device=device,
    )
    if dry_run:
        show_needs(api.plan_imatrix(src, out, text=text, config=config, options=options), console, str(out))
        return
    result = api.imatrix(src, out, text=text, config=config, options=options, progress=ProgressDisplay(console))
    if json_output:
        console.emit_json(result.to_json())
    part = "" if result.shard is None else f"part of shard {result.shard}: "
    console.print(f"{result.out}: {part}{result.matrices} matrices, {result.chunks} chunks of {chunk} tokens")
