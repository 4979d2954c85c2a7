"""Which formats there are, and which of them a path holds."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.base import Format
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config

_FORMATS: dict[str, str] = {
    "gguf": "gemma2tool.formats.gguf:GGUF",
    "gemma-pytorch": "gemma2tool.formats.gemma_pytorch:GemmaPytorch",
    "flax": "gemma2tool.formats.flax:Flax",
    "keras": "gemma2tool.formats.keras:Keras",
    "torchtune": "gemma2tool.formats.torchtune:Torchtune",
    "litgpt": "gemma2tool.formats.litgpt:LitGPT",
    "mlx": "gemma2tool.formats.mlx:MLX",
    "hf": "gemma2tool.formats.hf:HuggingFace",
}
"""Name to class, in the order of detection: the most telling first. Imported when asked for."""

NAMES = tuple(_FORMATS)


def by_name(name: str) -> Format:
    """The format of that name; ``UsageError`` that lists them for another."""
    try:
        module, _, kind = _FORMATS[name].partition(":")
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


def for_destination(path: Path, to: str | None) -> str:
    """The format to write: ``to`` if given, else from the destination's name."""
    if to is not None:
        return by_name(to).name
    return {".gguf": "gguf", ".ckpt": "gemma-pytorch"}.get(path.suffix.lower(), "hf")
