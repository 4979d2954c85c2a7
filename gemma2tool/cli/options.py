"""Options that several commands share, and how their values are parsed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from gemma2tool.cli.groups import completion
from gemma2tool.errors import UsageError
from gemma2tool.formats.options import Adapter


def format_names() -> Iterable[str]:
    """For completion: the formats."""
    from gemma2tool import api

    return [entry.format for entry in api.formats()]


def type_names() -> Iterable[str]:
    """For completion: the quantization types of all formats."""
    from gemma2tool import api

    plain = {"f32", "f16", "bf16"}
    return sorted({name for entry in api.formats() for name in entry.types if name not in plain})


def gate_names() -> Iterable[str]:
    """For completion: the gates, each ready for its limit."""
    from gemma2tool import api

    return [f"{name}=" for name in api.gate_names()]


STORED_DTYPES = ("f32", "bf16", "f16")

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="Checkpoint in any format that can be read: a file or folder, hf://ORG/NAME (or ORG/NAME), s3://, gs://,"
        " https://, .tar, .tar.gz.",
    ),
]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="What to write: NAME.gguf, NAME.ckpt, or a folder.")]
To = Annotated[
    str | None,
    typer.Option(
        "--to",
        metavar="FORMAT",
        help="Format to write; 'gemma2tool formats' lists them. Default: by the name of DST.",
        autocompletion=completion(format_names),
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="The model's config.json, or 2b, 9b, 27b, 2b-it, 9b-it, 27b-it, for weights that come without one.",
        autocompletion=completion(("2b", "9b", "27b", "2b-it", "9b-it", "27b-it")),
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Stored type of tensors that are not quantized: f32, bf16, f16; default: the source's.",
        autocompletion=completion(STORED_DTYPES),
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace an existing destination, once its replacement is complete and verified.",
        rich_help_panel="Output",
    ),
]
NoVerify = Annotated[
    bool,
    typer.Option("--no-verify", help="Don't verify the output; the result says so.", rich_help_panel="Verification"),
]
NoReceipt = Annotated[
    bool,
    typer.Option(
        "--no-receipt", help="Don't write DST.receipt.json beside the output.", rich_help_panel="Verification"
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, max=256, help="Threads. Default: one per processor.", rich_help_panel="Resources"),
]
Memory = Annotated[
    str, typer.Option("--memory", metavar="SIZE", help="Byte budget for data in flight.", rich_help_panel="Resources")
]
NoReaders = Annotated[
    bool,
    typer.Option(
        "--no-readers",
        help="Skip the second reading by safetensors, gguf or bitsandbytes.",
        rich_help_panel="Verification",
    ),
]
MaxShardSize = Annotated[
    str,
    typer.Option(
        "--max-shard-size", metavar="SIZE", help="Largest file of a sharded output.", rich_help_panel="Output"
    ),
]
Restart = Annotated[
    bool,
    typer.Option(
        "--restart",
        help="Start over; discard what an interrupted run left beside the destination.",
        rich_help_panel="Output",
    ),
]
ClipFloat16 = Annotated[
    bool,
    typer.Option(
        "--clip-f16",
        help="Store the largest float16 instead of refusing values beyond it; the result says how many.",
        rich_help_panel="Output",
    ),
]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Accept NaN and infinities in the source.", rich_help_panel="Output")
]
AllowMismatch = Annotated[
    bool,
    typer.Option(
        "--allow-mismatch",
        help="Warn instead of refusing if the target's consumer will compute something else.",
        rich_help_panel="Output",
    ),
]
AllowUnsafeTemplate = Annotated[
    bool,
    typer.Option(
        "--allow-unsafe-template",
        help="Carry a chat template that 'gemma2tool scan' calls dangerous.",
        rich_help_panel="Output",
    ),
]
Modelfile = Annotated[
    bool,
    typer.Option(
        "--modelfile", help="Write NAME.Modelfile beside a GGUF, for ollama create.", rich_help_panel="Output"
    ),
]
KeepDownload = Annotated[
    Path | None,
    typer.Option("--keep-download", metavar="FOLDER", help="Download a remote SRC to FOLDER first, and keep it there."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be written, and write nothing.", rich_help_panel="Output")
]
Tensors = Annotated[bool, typer.Option("--tensors", help="With --dry-run: list every tensor too.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="One line per result; no progress, no notes.", rich_help_panel="Screen")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show every gate and every measurement.", rich_help_panel="Screen")
]
Json = Annotated[bool, typer.Option("--json", help="Results as JSON on standard output.", rich_help_panel="Screen")]
Tokens = Annotated[
    Path | None,
    typer.Option(
        "--tokens",
        metavar="FILE",
        help="Token ids (.npy, integers, (T,) or (B, T)) for the logits gates.",
        rich_help_panel="Verification",
    ),
]
Text = Annotated[
    Path | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="Text (UTF-8) for the logits gates, instead of the built-in sample text.",
        rich_help_panel="Verification",
    ),
]
Gate = Annotated[
    list[str] | None,
    typer.Option(
        "--gate",
        metavar="NAME=LIMIT",
        help="Override a gate of the verification, e.g. kl=0.05. Repeatable.",
        autocompletion=completion(gate_names),
        rich_help_panel="Verification",
    ),
]
Sample = Annotated[
    int | None,
    typer.Option(
        "--sample",
        metavar="N",
        min=1,
        help="Let source and output continue the prompt by N tokens; each token takes a pass over both.",
        rich_help_panel="Verification",
    ),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="PATH[=SCALE]",
        help="Merge a LoRA adapter (peft, mlx-lm, litgpt, torchtune, Keras, gm, GGUF), scaled by SCALE. Repeatable.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Where to compute forward passes and calibration: cpu, or cuda.",
        autocompletion=completion(("cpu", "cuda")),
        rich_help_panel="Resources",
    ),
]


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What ``convert`` and ``quantize`` both take; the fields are the options, see ``groups``."""

    to: To = None
    config: ConfigFile = None
    lora: Lora = None
    force: Force = False
    no_verify: NoVerify = False
    no_receipt: NoReceipt = False
    no_readers: NoReaders = False
    tokens: Tokens = None
    text: Text = None
    gate: Gate = None
    sample: Sample = None
    max_shard_size: MaxShardSize = "50GB"
    allow_nonfinite: AllowNonfinite = False
    clip_f16: ClipFloat16 = False
    allow_mismatch: AllowMismatch = False
    allow_unsafe_template: AllowUnsafeTemplate = False
    modelfile: Modelfile = False
    restart: Restart = False
    keep_download: KeepDownload = None
    threads: Threads = None
    memory: Memory = "256MiB"
    device: Device = "cpu"
    dry_run: DryRun = False
    tensors: Tensors = False
    verbose: Verbose = False
    quiet: Quiet = False
    json_output: Json = False


def parse_lora(text: str) -> Adapter:
    """An adapter and its scale from "DIR" or "DIR=SCALE"; an existing folder of the whole name takes precedence."""
    folder, equals, scale = text.rpartition("=")
    if not equals or Path(text).exists():
        return Adapter(Path(text))
    try:
        return Adapter(Path(folder), float(scale))
    except ValueError:
        raise UsageError(
            "option.lora", f"--lora {text!r}: {scale!r} is not a number", hint="write --lora DIR=0.5"
        ) from None
