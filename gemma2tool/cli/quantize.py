"""``gemma2tool quantize``: the same model in fewer bits, straight from any format."""

from __future__ import annotations

from typing import Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.conversion import carry_out
from gemma2tool.cli.groups import completion
from gemma2tool.cli.reports import Reports
from gemma2tool.errors import UsageError
from gemma2tool.formats.options import GGUFOptions, PackingOptions, SplitOptions, WriteOptions
from gemma2tool.formats.options_budget import Budget
from gemma2tool.formats.options_calibration import Calibration


def quantize(
    src: o.Source,
    dst: o.Destination,
    type: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="For GGUF: q8_0, q4_0, q4_k_m, ... For a folder: nf4, fp4, int8, ... 'gemma2tool formats' lists all. "
            "Several, separated by commas, are written into the folder DST in one pass over SRC.",
            autocompletion=completion(o.type_names),
        ),
    ] = None,
    dtype: o.Dtype = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Accept a source that is already quantized.")
    ] = False,
    *,
    packing: PackingOptions,
    gguf: GGUFOptions,
    split: SplitOptions,
    calibration: Calibration,
    budget: Budget,
    output: o.OutputOptions,
    reports: Reports,
) -> None:
    """Quantize a checkpoint of any format. The output is verified before it gets its name."""
    options = WriteOptions(
        dtype=dtype,
        allow_requantize=allow_requantize,
        packing=packing,
        gguf=gguf,
        split=split,
        calibration=calibration,
    )
    if type is None and not budget.is_asked:
        hint = "give --type, or a target such as --target-size 1.6GiB"
        raise UsageError("type.missing", "no --type is given", hint=hint)
    carry_out(src, dst, output, reports, options, [] if type is None else _types(",".join(type)), budget)


def _types(text: str) -> list[str]:
    """The types that "a,b" names, each once."""
    names = list(dict.fromkeys(name.strip() for name in text.lower().split(",") if name.strip()))
    if not names:
        raise UsageError("type.missing", "--type is empty", hint="'gemma2tool formats' lists them")
    return names
