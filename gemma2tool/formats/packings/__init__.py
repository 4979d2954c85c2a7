"""Quantized schemes on top of the Hugging Face format, each in a module of its own, found by name.

A packing module has ``METHOD`` (``quant_method`` in the config), ``TYPES`` (its names on the command line),
``quantization_config``, ``encoder_for`` and ``unpack``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.quantizers.base import Encoder

if TYPE_CHECKING:
    from gemma2tool.model.tensors import TensorSpec

_MODULES: dict[str, tuple[str, tuple[str, ...]]] = {"bitsandbytes": ("bnb", ("nf4", "fp4", "int8"))}
"""``quant_method`` to module and type names."""

TYPES: tuple[str, ...] = tuple(name for _, names in _MODULES.values() for name in names)


def _module(file: str) -> ModuleType:
    return import_module(f"gemma2tool.formats.packings.{file}")


def _of_type(type_name: str) -> ModuleType:
    for file, names in _MODULES.values():
        if type_name in names:
            return _module(file)
    raise UsageError(
        "type.unknown",
        f"a Hugging Face folder cannot hold the type {type_name!r}",
        hint=f"choose one of {', '.join(TYPES)}; GGUF types need a .gguf destination",
    )


def part_name(tensor: str, suffix: str) -> str:
    """The stored name of a part of ``tensor`` ("P.weight"): "" and ".absmax" follow the name, "SCB" stands beside it ("P.SCB")."""
    if not suffix or suffix.startswith("."):
        return tensor + suffix
    return tensor.rpartition(".")[0] + "." + suffix


def quantization_config(type_name: str, *, double_quant: bool, compute_dtype: str = "bfloat16") -> dict[str, object]:
    """The ``quantization_config`` of config.json."""
    return _of_type(type_name).quantization_config(type_name, double_quant=double_quant, compute_dtype=compute_dtype)


def encoder_for(spec: TensorSpec, type_name: str, *, double_quant: bool, source: LazyTensor) -> Encoder | None:
    """How ``type_name`` stores the tensor, or None where it stays in the model's own type."""
    return _of_type(type_name).encoder_for(spec, type_name, double_quant=double_quant, source=source)


def unpack(raw: Mapping[str, LazyTensor], quantization: object) -> dict[str, LazyTensor]:
    """Canonical tensors, dequantizing as rows are read, of a quantized checkpoint's raw ones."""
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if method not in _MODULES:
        raise InputRefused(
            "quantization.method",
            f"config.json: quant_method {method!r} cannot be read",
            hint=f"methods that can be read: {', '.join(sorted(_MODULES))}",
        )
    return _module(_MODULES[method][0]).unpack(raw, quantization)
