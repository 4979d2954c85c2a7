"""``gemma2tool convert``: the same values in another format."""

from __future__ import annotations

from typing import Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.produce import Shared, produce
from gemma2tool.cli.reports import Reports


def convert(
    src: o.Source,
    dst: o.Destination,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="Stored type: f32, bf16, f16; default: the source's. For GGUF also auto (llama.cpp's rule), q8_0, tq1_0, tq2_0.",
        ),
    ] = None,
    *,
    shared: Shared,
    reports: Reports,
) -> None:
    """Convert a checkpoint to another format, and verify the result.

    The target follows from the name of DST (.gguf: GGUF; .ckpt: gemma_pytorch; else a Hugging Face folder) or from --to.
    """
    produce(src, dst, shared, reports, dtype=dtype)
