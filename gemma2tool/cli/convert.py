"""``gemma2tool convert``: the same values in another format."""

from __future__ import annotations

from typing import Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.adapter import convert_adapter
from gemma2tool.cli.conversion import carry_out
from gemma2tool.cli.groups import completion
from gemma2tool.cli.reports import Reports
from gemma2tool.formats.options import SplitOptions, WriteOptions


def convert(
    src: o.Source,
    dst: o.Destination,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="Stored type: f32, bf16, f16; default: the source's. For GGUF also auto (llama.cpp's rule), q8_0, "
            "tq1_0, tq2_0.",
            autocompletion=completion((*o.STORED_DTYPES, "auto", "q8_0", "tq1_0", "tq2_0")),
        ),
    ] = None,
    *,
    split: SplitOptions,
    output: o.OutputOptions,
    reports: Reports,
) -> None:
    """Convert a checkpoint to another format. The output is verified before it gets its name.

    If SRC is an adapter and DST ends in .gguf, a LoRA adapter for llama.cpp is written; --config names its base model.

    The target format is chosen by --to or by the name of DST (.gguf: GGUF; .ckpt: gemma_pytorch; else a Hugging Face
    folder).
    """
    from gemma2tool import api

    if api.is_adapter_conversion(src, dst, output.to):
        convert_adapter(src, dst, output, reports, WriteOptions(dtype=dtype, split=split))
    else:
        carry_out(src, dst, output, reports, WriteOptions(dtype=dtype, split=split))
