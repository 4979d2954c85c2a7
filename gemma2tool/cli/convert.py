"""``gemma2tool convert``: the same values in another format."""

from __future__ import annotations

from typing import Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.produce import produce


def convert(
    src: o.Source,
    dst: o.Destination,
    to: o.To = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="Stored type: f32, bf16, f16; default: the source's. For GGUF also auto (llama.cpp's rule), q8_0, tq1_0, tq2_0.",
        ),
    ] = None,
    config: o.ConfigFile = None,
    lora: o.Lora = None,
    force: o.Force = False,
    no_verify: o.NoVerify = False,
    tokens: o.Tokens = None,
    gate: o.Gate = None,
    max_shard_size: o.MaxShardSize = "50GB",
    split_max_size: o.SplitMaxSize = None,
    split_max_tensors: o.SplitMaxTensors = None,
    allow_nonfinite: o.AllowNonfinite = False,
    allow_mismatch: o.AllowMismatch = False,
    threads: o.Threads = None,
    memory: o.Memory = "256MiB",
    dry_run: o.DryRun = False,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Convert a checkpoint to another format, and verify the result.

    The target follows from the name of DST (.gguf: GGUF; .ckpt: gemma_pytorch; else a Hugging Face folder) or from --to.
    """
    extra = {"split_max_size": o.optional_size(split_max_size), "split_max_tensors": split_max_tensors}
    produce(
        src,
        dst,
        to=to,
        dtype=dtype,
        type=None,
        extra=extra,
        config=config,
        lora=lora,
        force=force,
        no_verify=no_verify,
        tokens=tokens,
        gate=gate,
        max_shard_size=max_shard_size,
        allow_nonfinite=allow_nonfinite,
        allow_mismatch=allow_mismatch,
        threads=threads,
        memory=memory,
        dry_run=dry_run,
        quiet=quiet,
        json_output=json_output,
    )
