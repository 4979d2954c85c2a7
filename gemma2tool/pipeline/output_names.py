"""Names and types of an output that show a mistake before anything is opened: a folder with a file's name, a type of
another format.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma2tool.errors import UsageError, choices
from gemma2tool.formats import packings, registry
from gemma2tool.model.format_facts import TypeFamily
from gemma2tool.quantizers.mixtures import FILE_TYPES

FLOAT_DTYPES = ("f32", "f16", "bf16")

_ARCHIVES = (".gz", ".tgz", ".tar", ".zip", ".xz", ".bz2", ".zst", ".7z", ".rar")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".keras", ".sbs", ".gguf", ".mlx")
_OTHER = (
    ".npz", ".npy", ".txt", ".json", ".yaml", ".yml", ".csv", ".md", ".log", ".pkl", ".pickle", ".onnx", ".msgpack",
    ".tflite", ".pb", ".model", ".ggml", ".dat", ".parquet", ".py",
)  # fmt: skip


@dataclass(frozen=True)
class _Family:
    """Types, what one of them is, and what to do to get it."""

    types: tuple[str, ...]
    kind: str
    hint: str

    def refusal(self, type_name: str, format_name: str) -> UsageError:
        message = f"{type_name} is {self.kind}, but the output format is {format_name}"
        return UsageError("type.unknown", message, hint=self.hint)


_FAMILIES: Mapping[TypeFamily, _Family] = {
    "folders": _Family(packings.TYPES, "a type of quantized folders", "name a folder as DST, without .gguf"),
    "gguf": _Family(tuple(FILE_TYPES), "a GGUF type", "name it NAME.gguf"),
}


def check_name(destination: Path, format_name: str, *, is_file: bool) -> None:
    """Raises ``UsageError`` (``output.kind``) for a name that is a file's where a folder would be written, and for a
    single file whose name is another kind's.
    """
    if is_file and destination.suffix.lower() in registry.FACTS[format_name].suffixes:
        return
    if destination.name == "-":
        raise UsageError(
            "output.kind",
            "-: the output cannot be written to standard output",
            hint="name a file (NAME.gguf, NAME.ckpt) or a folder",
        )
    suffix = destination.suffix.lower()
    if destination.is_dir() or suffix not in (*_ARCHIVES, *_WEIGHTS, *_OTHER):
        return
    own = registry.FACTS[format_name].suffixes
    stem = destination.with_suffix("")
    if suffix in _ARCHIVES:
        message, hint = "archives are not written", f"write {shlex.quote(str(stem))}, then pack it"
    elif own:
        message, hint = f"{format_name} is written as {own[0]}", f"name it {shlex.quote(str(stem))}{own[0]}"
    else:
        message = f"{format_name} is written as a folder, and this is the name of a file"
        hint = f"name a folder, such as {shlex.quote(str(stem))}"
    raise UsageError("output.kind", f"{destination}: {message}", hint=hint)


def check_type(format_name: str, type_name: str | None) -> None:
    """Raises ``UsageError`` (``type.unknown``) for a type that belongs to another format."""
    own = registry.FACTS[format_name].type_family
    if type_name is None or type_name in _FAMILIES[own].types:
        return
    if type_name in FLOAT_DTYPES:
        raise UsageError(
            "type.unknown",
            f"{type_name} is not a quantization type of {format_name}",
            hint=f"use 'gemma2tool convert --dtype {type_name}'",
        )
    others = [family for name, family in _FAMILIES.items() if name != own]
    for family in others:
        if type_name in family.types:
            raise family.refusal(type_name, format_name)
    if choices.meant(type_name, registry.by_name(format_name).types):
        return  # the format itself says which
    for family in others:
        for meant in choices.meant(type_name, family.types)[:1]:
            raise family.refusal(f"{type_name} (did you mean {meant}?)", format_name)
