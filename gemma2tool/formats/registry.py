"""Which formats there are, and which of them a path holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.base import Format
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config


@dataclass(frozen=True)
class Listing:
    """A line of the list of formats: its class as ``module:class``, imported when asked for, and what a person wants to know.

    ``suffix``: of the destinations that are written in this format unless told otherwise; ``extra``: of the package, where a library is
    needed that it does not bring, and ``extra_to``: what that needs it; ``floats``: the types that plain values are written in.
    """

    name: str
    where: str
    files: str
    remarks: str
    suffix: str | None = None
    extra: str | None = None
    extra_to: str = ""
    floats: tuple[str, ...] = ("f32", "f16", "bf16")


LISTINGS: tuple[Listing, ...] = (
    Listing("gguf", "gemma2tool.formats.gguf.format:GGUF", "NAME.gguf", "llama.cpp; split files too", suffix=".gguf"),
    Listing(
        "gemma-pytorch",
        "gemma2tool.formats.torch.gemma_pytorch:GemmaPytorch",
        "NAME.ckpt, or a folder with one",
        "Google's original; shards with an index and the int8 variant read",
        suffix=".ckpt",
    ),
    Listing(
        "gemma-cpp",
        "gemma2tool.formats.gemma_cpp.format:GemmaCpp",
        "NAME.sbs",
        "gemma.cpp; 8-bit SFP, 4-bit NUQ read",
        suffix=".sbs",
        floats=("f32", "bf16"),
    ),
    Listing(
        "maxtext",
        "gemma2tool.formats.orbax.maxtext:MaxText",
        "a folder of Orbax's with MaxText's names",
        "not exact: it stores scaled embeddings and queries; --config where no config.json lies beside it",
        extra="flax",
        extra_to="read",
    ),
    Listing(
        "flax",
        "gemma2tool.formats.orbax.flax:Flax",
        "a folder of Orbax's, beside tokenizer.model",
        "Google's JAX release; --config for other shapes than the released",
        extra="flax",
        extra_to="read",
    ),
    Listing(
        "keras",
        "gemma2tool.formats.keras.format:Keras",
        "a folder with config.json and model.weights.h5, or shards",
        "keras-hub preset",
        extra="keras",
        extra_to="write",
    ),
    Listing(
        "torchtune",
        "gemma2tool.formats.torch.torchtune:Torchtune",
        "a folder with tune_state_dict.pt",
        "torchtune's own state dict",
    ),
    Listing(
        "litgpt",
        "gemma2tool.formats.torch.litgpt:LitGPT",
        "a folder with lit_model.pth",
        "litgpt; files from before 2025 read",
    ),
    Listing(
        "mlx",
        "gemma2tool.formats.mlx:MLX",
        "a folder with config.json and .safetensors of mlx-lm",
        "plain or affine-quantized",
    ),
    Listing(
        "hf-bin",
        "gemma2tool.formats.hf.bin:HuggingFaceBin",
        "a folder with config.json and pytorch_model.bin, or shards",
        "Hugging Face before safetensors",
    ),
    Listing(
        "hf",
        "gemma2tool.formats.hf.format:HuggingFace",
        "a folder with config.json and .safetensors",
        "Hugging Face; plain or quantized",
    ),
)
"""In the order of detection: the most telling first."""

_BY_NAME = {listing.name: listing for listing in LISTINGS}
NAMES = tuple(_BY_NAME)


def by_name(name: str) -> Format:
    """The format of that name; ``UsageError`` that lists them for another."""
    try:
        module, _, kind = _BY_NAME[name].where.partition(":")
    except KeyError:
        raise UsageError(
            "format.unknown", f"there is no format {name!r}", hint=f"choose one of {', '.join(sorted(NAMES))}"
        ) from None
    make: Callable[[], Format] = getattr(import_module(module), kind)
    return make()


def detect(path: Path) -> Format:
    """The format of the files at ``path``; ``InputRefused`` where none knows them."""
    if not path.exists():
        raise InputRefused("input.missing", f"{path}: no such file or folder", hint="check the path of the checkpoint")
    if not path.is_file() and not path.is_dir():
        raise InputRefused("input.kind", f"{path}: neither a file nor a folder", hint="give the path of a checkpoint")
    if path.is_file() and path.stat().st_size == 0:
        raise InputRefused("input.empty", f"{path}: is empty", hint="fetch the file again")
    for name in NAMES:
        candidate = by_name(name)
        if candidate.detect(path):
            return candidate
    raise InputRefused(
        "input.unknown",
        f"{path}: not a Gemma 2 checkpoint in a known format",
        hint=f"formats that can be read: {', '.join(sorted(NAMES))}; see 'gemma2tool formats'",
    )


def open_checkpoint(path: Path, *, config: Gemma2Config | None = None, format: str | None = None) -> Checkpoint:
    """Open a checkpoint of any format: headers only, checked against the tensor table."""
    return (by_name(format) if format else detect(path)).open(path, config=config)


def for_destination(path: Path, to: str | None, type: str | None = None) -> str:
    """The format to write: ``to`` if given, else from the destination's name and, for a folder, the quantization type."""
    if to is not None:
        return by_name(to).name
    folder = "mlx" if type is not None and type.startswith("mlx-") else "hf"
    return next((each.name for each in LISTINGS if each.suffix and each.suffix == path.suffix.lower()), folder)
