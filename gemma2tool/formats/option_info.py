"""What an option is: how users write it, what it does, and which formats and types take it.

An option is a field of a frozen dataclass, see ``option``. Nothing heavy is imported here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gemma2tool.errors import UsageError, choices
from gemma2tool.quantizers.mixtures import ALIASES, FILE_TYPES, FLOATS

QUANTIZED_FOLDERS = ("hf", "mlx")
"""Formats whose outputs are quantized folders."""

GGUF_QUANTIZED = (*(name for name in FILE_TYPES if name not in FLOATS), *ALIASES)
"""GGUF's quantized types, by the names of --type."""

COMPRESSED = (
    *("w8a8-int8", "w8a16", "w4a16", "w4a16-asym", "w4afp8", "fp8-dynamic", "fp8-block"),
    *("nvfp4a16", "mxfp4a16", "mxfp8a16"),
)
"""The types of compressed-tensors, several of which may stand in one folder."""

FOLDERS_QUANTIZED = (
    *("nf4", "fp4", "int8"),
    *COMPRESSED,
    *("gptq-4", "gptq-8", "awq-4"),
    *(f"torchao-{name}" for name in ("int8", "int8-dynamic", "fp8", "fp8-dynamic", "int4", "int8-int4")),
    *(f"mlx-{bits}" for bits in (2, 3, 4, 5, 6, 8)),
    *(f"mlx-mixed-{bits}" for bits in ("2-6", "3-4", "3-6", "4-6")),
    *(f"mlx-{mode}" for mode in ("mxfp4", "mxfp8", "nvfp4")),
)
"""The types of quantized folders."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes from "512MiB", "5GB", "2g" or a plain number; decimal units are powers of 1000, Ki, Mi, Gi
    powers of 1024.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size <= 0:
        raise UsageError("option.size", f"{text!r} is not a size", hint="write it like 512MiB or 5GB")
    return size


def parse_tensor_type(text: str, flag: str = "--tensor-type") -> tuple[str, str]:
    """A pattern and a type from "REGEX=TYPE", split at the last equals sign."""
    pattern, equals, type_name = text.rpartition("=")
    if not equals or not pattern or not type_name:
        raise UsageError(
            "option.pair", f"{flag} {text!r} is not of the form REGEX=TYPE", hint=f"write {flag} REGEX=TYPE"
        )
    return pattern, type_name


def parse_module_type(text: str) -> tuple[str, str]:
    """``parse_tensor_type`` for --module-type."""
    return parse_tensor_type(text, "--module-type")


@dataclass(frozen=True)
class OptionInfo:
    """An option as users meet it: how it is written, what it does, and who takes it.

    ``flag``: as typed on the command line. ``key``: its name in receipts. ``formats``, ``types``: the formats and
    quantization types that take it; empty for all. ``choices``: its values, where they can be listed. ``parse``: from
    the command line's text. ``id``: of the error for a target that does not take it.
    """

    flag: str
    help: str
    key: str = ""
    metavar: str | None = None
    formats: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None
    minimum: float | None = None
    maximum: float | None = None
    id: str = "option.ignored"

    @property
    def takers(self) -> str:
        """Who takes it, for help and hints: "GGUF", "nf4 and fp4", "quantized folders"."""
        if self.types:
            *others, last = type_names(self.types)
            return f"{', '.join(others)} and {last}" if others else last
        if self.formats == QUANTIZED_FOLDERS:
            return "quantized folders"
        return ", ".join("GGUF" if name == "gguf" else name for name in self.formats)

    @property
    def full_help(self) -> str:
        """The help text, with who takes the option in front."""
        return f"{self.takers}: {self.help}" if self.takers else self.help

    def help_below(self, heading: str | None) -> str:
        """The help text below a heading, which need not be repeated."""
        return self.help[:1].upper() + self.help[1:] if heading == self._heading else self.full_help

    @property
    def _heading(self) -> str:
        return self.takers[:1].upper() + self.takers[1:]

    def is_taken_by(self, format_name: str, type_name: str | None) -> bool:
        """Whether the option has an effect on an output of this format and type."""
        if self.formats and (format_name not in self.formats or (format_name in QUANTIZED_FOLDERS and not type_name)):
            return False
        return not self.types or (type_name is not None and type_name.lower() in self.types)


def type_names(types: Iterable[str]) -> list[str]:
    """Types for a sentence: GGUF's, and those of folders, where all quantized ones are among them, as one."""
    names = list(types)
    for group, name in ((GGUF_QUANTIZED, "GGUF's quantized types"), (FOLDERS_QUANTIZED, "those of folders")):
        if set(group) <= set(names):
            names = [*(other for other in names if other not in group), name]
    return names


def option(default: Any, flag: str, help: str, **more: Any) -> Any:
    """A dataclass field that is an option, see ``OptionInfo``; ``default`` means that it was not given."""
    return field(default=default, metadata={"option": OptionInfo(flag, help, **more)})


def option_fields(group: type | Any) -> Iterator[tuple[dataclasses.Field[Any], OptionInfo]]:
    """The fields of a dataclass that are options."""
    for option_field in fields(group):
        if "option" in option_field.metadata:
            yield option_field, option_field.metadata["option"]


def normalize(options: Any) -> None:
    """Lists become tuples and path texts become paths, so that callers may pass either."""
    for option_field, info in option_fields(options):
        value = getattr(options, option_field.name)
        if isinstance(value, list):
            object.__setattr__(options, option_field.name, tuple(value))
        elif info.metavar == "FILE" and isinstance(value, str):
            object.__setattr__(options, option_field.name, Path(value))


def refuse_unknown(group: Any) -> None:
    """Raises ``UsageError`` (``option.choice``) for an option of ``group`` whose value is not among its choices."""
    for option_field, info in option_fields(group):
        value = getattr(group, option_field.name)
        if isinstance(value, str) and info.choices and value not in info.choices:
            hint = choices.hint(value, info.choices)
            raise UsageError("option.choice", f"{info.flag} {value!r} is not a choice", hint=hint)


def refuse_ignored(group: Any, format_name: str, type_name: str | None) -> None:
    """Raises ``UsageError`` for an option of ``group`` that was given and that an output of this format and type
    ignores.
    """
    for option_field, info in option_fields(group):
        if getattr(group, option_field.name) == option_field.default or info.is_taken_by(format_name, type_name):
            continue
        fits_format = not info.formats or format_name in info.formats
        target = type_name if type_name and info.types and fits_format else format_name
        raise UsageError(info.id, f"{info.flag} has no effect for {target}", hint=f"it is for {info.takers}")
