"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma2tool.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from gemma2tool.model.config import Gemma2Config

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes from "512MiB", "5GB", "2g" or a plain number; decimal units are powers of 1000, Ki, Mi, Gi powers of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size <= 0:
        raise UsageError("option.size", f"{text!r} is not a size", hint="write it like 512MiB or 5GB")
    return size


def default_threads() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_config(path: Path | None) -> Gemma2Config | None:
    """The config that ``--config`` names: a file, or one of the released sizes."""
    if path is None:
        return None
    from gemma2tool.model.config import SIZES

    if str(path) in SIZES and not path.exists():
        return SIZES[str(path)]
    from gemma2tool.formats.assets import read_config

    return read_config(path)


Source = Annotated[
    Path, typer.Argument(metavar="SRC", help="Checkpoint: a file or a folder, in any format that can be read.")
]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="What to write: NAME.gguf, NAME.ckpt, or a folder.")]
To = Annotated[
    str | None,
    typer.Option(
        "--to", metavar="FORMAT", help="Format to write; 'gemma2tool formats' lists them. Default: by the name of DST."
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="The model's config.json, or 2b, 9b or 27b, where the weights come without."
    ),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Replace an existing destination, once its replacement is complete and verified."),
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Don't verify the output; the result says so.")]
NoReceipt = Annotated[bool, typer.Option("--no-receipt", help="Write no DST.receipt.json beside the output.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, max=256, help="Threads. Default: one for each processor.")
]
Memory = Annotated[str, typer.Option("--memory", metavar="SIZE", help="Byte budget for data in flight.")]
MaxShardSize = Annotated[
    str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest file of a sharded output.")
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Begin anew; discard what an interrupted run left beside the destination.")
]
ClipFloat16 = Annotated[
    bool,
    typer.Option(
        "--clip-f16", help="Store the largest float16 instead of refusing values beyond it; the result says how many."
    ),
]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Accept NaN and infinities in the source.")]
AllowMismatch = Annotated[
    bool,
    typer.Option(
        "--allow-mismatch", help="Write even what the target's consumer will compute differently; warn instead."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be written, and write nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no remarks; results and errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Results as JSON on standard output.")]
Tokens = Annotated[
    Path | None,
    typer.Option("--tokens", metavar="FILE", help="Token ids (.npy, integers, (T,) or (B, T)) for the logits gates."),
]
Text = Annotated[
    Path | None,
    typer.Option("--text", metavar="FILE", help="Text (UTF-8) for the logits gates, in place of a short one of ours."),
]
Gate = Annotated[
    list[str] | None,
    typer.Option("--gate", metavar="NAME=LIMIT", help="Override a gate of the verification, e.g. kl=0.05. Repeatable."),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="DIR[=SCALE]",
        help="Merge a PEFT LoRA adapter, its strength times SCALE. Repeatable, in order.",
    ),
]
SplitMaxSize = Annotated[
    str | None, typer.Option("--split-max-size", metavar="SIZE", help="GGUF: split into files of at most this size.")
]
SplitMaxTensors = Annotated[
    int | None, typer.Option("--split-max-tensors", min=1, help="GGUF: split into files of at most this many tensors.")
]


Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="Where to compute: cpu, or cuda.")]


def check_device(name: str) -> str:
    """``name`` as torch takes it. Raises ``UsageError`` for no device, ``ResourceError`` for one that is not there."""
    import torch

    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError("option.device", f"--device {name} is no device", hint="choose cpu, cuda or cuda:1")
    if name != "cpu" and not torch.cuda.is_available():
        raise ResourceError("device.missing", f"--device {name}: no GPU that torch can use", hint="use --device cpu")
    return name


def optional_size(text: str | None) -> int | None:
    """``parse_size``, or None for no text."""
    return None if text is None else parse_size(text)


def parse_pair(text: str, option: str, form: str) -> tuple[str, str]:
    """ "left=right", split at the last equals sign."""
    left, equals, right = text.rpartition("=")
    if not equals or not left or not right:
        raise UsageError("option.pair", f"{option} {text!r} is not of the form {form}", hint=f"write {option} {form}")
    return left, right


def parse_lora(text: str) -> tuple[Path, float]:
    """An adapter's folder and its scale from "DIR" or "DIR=SCALE"; a folder of that whole name comes first."""
    folder, equals, scale = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(folder), float(scale)
    except ValueError:
        raise UsageError(
            "option.lora", f"--lora {text!r}: {scale!r} is no number", hint="write --lora DIR=0.5"
        ) from None
