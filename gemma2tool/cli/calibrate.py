"""``gemma2tool calibrate``: Hessians from a text, for ``quantize --hessians`` of any type."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.sharding import ShardOption, shard_of
from gemma2tool.storage.units import human_bytes


def calibrate(
    src: o.Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file of Hessians to write (.hessians).")],
    text: Annotated[
        Path,
        typer.Option("--text", metavar="FILE", help="Text (UTF-8), or token ids (.npy), of the kind the model is for."),
    ],
    hessians: Annotated[
        bool, typer.Option("--hessians", help="Collect Hessians: the default, and the only thing to collect.")
    ] = True,
    samples: Annotated[
        int | None, typer.Option("--calibration-samples", min=1, help="Sequences to run. Default: 128.")
    ] = None,
    length: Annotated[
        int | None, typer.Option("--calibration-length", min=16, help="Tokens of a sequence. Default: 512.")
    ] = None,
    hessian_block: Annotated[
        int | None, typer.Option("--hessian-block", min=32, help="As for 'quantize --calibration'.")
    ] = None,
    shard: ShardOption = None,
    config: o.ConfigFile = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    restart: o.Restart = False,
    dry_run: o.DryRun = False,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Collect the Hessians of every matrix on a text once, for calibrated files of any type and size.

    'quantize --hessians OUT' takes them in place of '--calibration'.
    """
    from gemma2tool import api
    from gemma2tool.cli.progress import ProgressDisplay
    from gemma2tool.cli.terminal import Console

    console = Console(quiet=quiet, json=json_output)
    options = api.HessiansOptions(
        samples=samples,
        length=length,
        hessian_block=hessian_block,
        shard=shard_of(shard),
        force=force,
        restart=restart,
        dry_run=dry_run,
        threads=threads or api.default_threads(),
        device=device,
    )
    result = api.calibrate(src, out, text=text, config=config, options=options, progress=ProgressDisplay(console))
    if json_output:
        console.emit_json(result.to_json())
    part = "" if result.shard is None else f"part of shard {result.shard}: "
    of = f"{result.hessians} Hessians over {result.sequences} sequences of {result.length} tokens"
    for line in result.needs.lines() if dry_run else ():
        console.print(line)
    verb = "" if result.written else "would write "
    console.print(f"{result.out}: {part}{verb}{of}, {human_bytes(result.nbytes)}")
