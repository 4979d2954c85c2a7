"""``gemma2tool quantize``: the same model in fewer bits, straight from any format."""

from __future__ import annotations

from typing import Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.calibration import CalibrationOptions
from gemma2tool.cli.produce import Shared, produce
from gemma2tool.cli.reports import Reports


def quantize(
    src: o.Source,
    dst: o.Destination,
    type: Annotated[
        str,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="For GGUF: q8_0, q4_0, q4_k_m, ... For a folder: nf4, fp4, int8, ... 'gemma2tool formats' lists all. "
            "Several, with commas, go into the folder DST in one pass over SRC.",
        ),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="Stored type of what is not quantized: f32, bf16, f16; default: the source's.",
        ),
    ] = None,
    double_quant: Annotated[bool, typer.Option("--double-quant", help="nf4 and fp4: quantize the scales too.")] = False,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            metavar="N",
            help="GPTQ, AWQ, MLX, w4a16, w4a16-asym, w8a16: columns that share a scale: 32, 64 or 128; "
            "for all but MLX also -1, a whole row.",
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option("--sym/--asym", help="GPTQ: zero points in the middle, or chosen by group. Default: --sym."),
    ] = None,
    gptq_format: Annotated[
        str | None,
        typer.Option(
            "--gptq-format", metavar="FORMAT", help="GPTQ: how zero points are stored: gptq (default) or gptq_v2."
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip",
            metavar="REGEX",
            help="Folders: leave the tensors whose names match as they are. Repeatable.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="REGEX", help="Folders: quantize no tensors but those that match. Repeatable."),
    ] = None,
    imatrix: Annotated[
        o.Path | None, typer.Option("--imatrix", metavar="FILE", help="GGUF: importance matrix (GGUF or legacy .dat).")
    ] = None,
    pure: Annotated[bool, typer.Option("--pure", help="GGUF: every tensor in the default type.")] = False,
    token_embedding_type: Annotated[
        str | None, typer.Option("--token-embedding-type", metavar="TYPE", help="GGUF: type of the embedding.")
    ] = None,
    output_tensor_type: Annotated[
        str | None,
        typer.Option(
            "--output-tensor-type", metavar="TYPE", help="GGUF: type of the output matrix (the embedding, if tied)."
        ),
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-type",
            metavar="REGEX=TYPE",
            help="GGUF: type of the tensors that match; the first match wins. Repeatable.",
        ),
    ] = None,
    include_weights: Annotated[
        list[str] | None,
        typer.Option(
            "--include-weights", metavar="NAME", help="GGUF: use the importance matrix for these tensors only."
        ),
    ] = None,
    exclude_weights: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude-weights", metavar="NAME", help="GGUF: don't use the importance matrix for these tensors."
        ),
    ] = None,
    override_kv: Annotated[
        list[str] | None,
        typer.Option("--override-kv", metavar="KEY=TYPE:VALUE", help="GGUF: set a key-value. Repeatable."),
    ] = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Accept a source that is quantized already.")
    ] = False,
    *,
    calibration: CalibrationOptions,
    shared: Shared,
    reports: Reports,
) -> None:
    """Quantize a checkpoint, straight from its original format, and verify the result."""
    extra = {
        "double_quant": double_quant,
        "group_size": group_size,
        "symmetric": symmetric,
        "gptq_format": gptq_format,
        "skip": skip,
        "only": only,
        "imatrix": imatrix,
        "pure": pure,
        "token_embedding_type": token_embedding_type,
        "output_tensor_type": output_tensor_type,
        "tensor_types": [o.parse_pair(text, "--tensor-type", "REGEX=TYPE") for text in tensor_type or ()],
        "include_weights": include_weights,
        "exclude_weights": exclude_weights,
        "override_kv": override_kv,
        "allow_requantize": allow_requantize,
        **calibration.extra(type),
    }
    produce(src, dst, shared, reports, dtype=dtype, type=type.lower(), extra=extra)
