"""Packings: quantized checkpoints on top of the Hugging Face format.

A packing (``base.Packing``) stores some weights as several tensors each (codes, scales, ...), which
``quantization_config`` in config.json describes. Each module here holds one; adding one takes a module and an entry in
``_PACKINGS``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from gemma2tool.errors import InputRefused, UsageError, choices
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.packings.auto_round import AutoRoundPacking
from gemma2tool.formats.packings.awq import AwqPacking
from gemma2tool.formats.packings.base import Packing
from gemma2tool.formats.packings.bnb import BitsAndBytesPacking
from gemma2tool.formats.packings.compressed_tensors import CompressedTensorsPacking
from gemma2tool.formats.packings.gptq import GptqPacking
from gemma2tool.formats.packings.hqq import DESCRIBED, HqqPacking
from gemma2tool.formats.packings.mlx import MLXPacking
from gemma2tool.formats.packings.parts import part_name
from gemma2tool.formats.packings.selection import (
    consumer_remarks,
    excluded_tensors,
    fusion_remarks,
    is_named,
    linear_layers,
    mixture_remarks,
    own_types,
    quantized_modules,
)
from gemma2tool.formats.packings.settings import Settings
from gemma2tool.formats.packings.torchao import TorchaoPacking
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.model.tensors import HEAD_MODULES, TensorSpec
from gemma2tool.quantizers.base import Encoder
from gemma2tool.storage.quoting import quoted

__all__ = [
    "TYPES",
    "Choice",
    "Settings",
    "choose_encoders",
    "config_entries",
    "encoder_for",
    "implied_config",
    "metadata",
    "methods",
    "misread",
    "more_files",
    "own_types",
    "part_name",
    "quantization_config",
    "quantized_modules",
    "settings_for",
    "siblings",
    "unpack",
]

_PACKINGS: tuple[Packing, ...] = (
    BitsAndBytesPacking(),
    CompressedTensorsPacking(),
    GptqPacking(),
    AwqPacking(),
    AutoRoundPacking(),
    HqqPacking(),
    TorchaoPacking(),
    MLXPacking(),
)
_BY_TYPE = {type_name: packing for packing in _PACKINGS for type_name in packing.types}
_NO_MODULES: Mapping[str, bool] = MappingProxyType({})
_NO_TYPES: Mapping[str, str] = MappingProxyType({})
_NO_METADATA: Mapping[str, str] = MappingProxyType({})

TYPES = tuple(_BY_TYPE)
"""Names of the quantization types that a folder of safetensors can be written in."""


def methods(types: Collection[str]) -> tuple[str, ...]:
    """The quantization methods, by their names in configs, that have one of ``types``."""
    return tuple(packing.method for packing in _PACKINGS if not set(packing.types).isdisjoint(types))


def unpack(
    raw: Mapping[str, LazyTensor], quantization_config: object, metadata: Mapping[str, str] = _NO_METADATA
) -> dict[str, LazyTensor]:
    """The canonical tensors of a quantized checkpoint; rows are dequantized when they are read.

    ``raw``: the tensors as the files name them. Unquantized ones are passed through. ``quantization_config``: parsed
    from config.json. ``metadata``: of the files, which for torchao say how each weight is stored. Raises
    ``InputRefused`` if no packing knows the config, or if the parts of a tensor are missing,
    contradict one another, or have a known fault.
    """
    config = quantization_config if isinstance(quantization_config, Mapping) else {}
    return _recognized(config).unpack(raw, config, metadata)


def implied_config(names: Iterable[str]) -> dict[str, object] | None:
    """The ``quantization_config`` of tensors that describe themselves, as HQQ's do; None for others."""
    return {"quant_method": HqqPacking.method} if any(name.endswith(DESCRIBED) for name in names) else None


def misread(quantization_config: object, specs: Mapping[str, TensorSpec], stored: Collection[str]) -> dict[str, str]:
    """Weights that are stored unquantized and that libraries take for quantized ones, because config.json does not list
    their modules: name -> a sentence.

    ``specs``: of the checkpoint's tensors. ``stored``: the names of those that are not quantized.
    """
    config = quantization_config if isinstance(quantization_config, Mapping) else {}
    packing = _recognized(config)
    modules = {name: name.removesuffix(".weight") for name in linear_layers(specs) if name in stored}
    default = {"lm_head", *(module for module in modules.values() if f"{module}.bias" not in specs)}
    # The base class's modules have no prefix; a file may be meant for either.
    spellings = {*modules.values(), *(module.removeprefix("model.") for module in modules.values())}
    unlisted = packing.misread(spellings, default & HEAD_MODULES, config)
    names = [
        name for name, module in modules.items() if module in unlisted and module.removeprefix("model.") in unlisted
    ]
    if names and len(modules) == len(linear_layers(specs)):
        # A merge of an adapter into dequantized weights leaves the base's entry behind.
        sentence = (
            f"and all others are stored unquantized, but config.json has a quantization_config: {packing.title} takes"
            " them for quantized; remove that entry, or convert the folder, which leaves it out"
        )
        return {names[0]: sentence}
    return {
        name: f"is stored unquantized, and config.json does not list {modules[name]} as unquantized:"
        f" {packing.title} takes it for a quantized layer"
        for name in names
    }


def _recognized(config: Mapping[str, object]) -> Packing:
    for packing in _PACKINGS:
        if packing.recognizes(config):
            return packing
    raise InputRefused(
        "packing.unknown",
        f"config.json: quantization_config has the unknown quant_method {quoted(config.get('quant_method'))}",
        hint=f"known methods are {', '.join(packing.method for packing in _PACKINGS)}",
    )


def encoder_for(spec: TensorSpec, settings: Settings, source: LazyTensor) -> Encoder | None:
    """The encoder that stores a tensor in this type; None if the tensor is never quantized.

    ``source`` has the dtype that the weight is quantized from. With double quantization it is read once here: the sizes
    of the stored parts depend on its values.
    """
    return _packing(settings.type).encoder_for(spec, settings, source)


def settings_for(options: WriteOptions, format_name: str, types: Collection[str]) -> Settings | None:
    """The settings for what a user asked of an output; None if it is not to be quantized.

    Raises ``UsageError`` if the type is not among ``types``, which the format can hold.
    """
    if options.type is None:
        return None
    if options.type not in types:
        raise UsageError(
            "format.type",
            f"the {format_name} format cannot hold {options.type}",
            hint=choices.hint(options.type, list(types), more=", or another format"),
        )
    return Settings(options.type, options.packing, options.act_order)


@dataclass(frozen=True)
class Choice:
    """The encoders of all tensors to quantize, by name, and remarks on what is left unquantized."""

    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    remarks: Sequence[str] = ()


def choose_encoders(
    specs: Mapping[str, TensorSpec],
    sources: Mapping[str, LazyTensor],
    settings: Settings,
    own_types: Mapping[str, str] = _NO_TYPES,
) -> Choice:
    """Which tensors to quantize, and how.

    ``own_types``: the types of tensors that differ from ``settings.type``, by name; of the same packing.
    Raises ``UsageError`` for patterns that match nothing, and if nothing would be quantized.
    """
    packing = _packing(settings.type)
    excluded = excluded_tensors(specs, settings)
    by_type = {name: replace(settings, type=name) for name in (settings.type, *own_types.values())}
    chosen = {}
    for name, spec in specs.items():
        own = by_type[own_types.get(name, settings.type)]
        if name not in excluded and (encoder := packing.encoder_for(spec, own, sources[name])) is not None:
            chosen[name] = encoder
    if not chosen:
        raise UsageError(
            "quantize.nothing",
            f"nothing would be quantized to {settings.type}",
            hint="change --skip and --only: they leave no weight that the type can hold",
        )
    remarks = [remark for own in by_type.values() for remark in consumer_remarks(own)]
    remarks += packing.remarks(chosen)
    for name, spec in specs.items():
        if spec.quantizable and name not in chosen and is_named(name, settings):
            remarks.append(f"{name} is left unquantized: consumers of {settings.type} cannot load it quantized")
    if packing.is_fused_by_engines:
        remarks += fusion_remarks(quantized_modules(specs, chosen))
        remarks += mixture_remarks({name: own_types.get(name, settings.type) for name in chosen})
    return Choice(packing.together(chosen), remarks)


def quantization_config(
    settings: Settings, modules: Mapping[str, bool] = _NO_MODULES, *, dtype: str = "bfloat16"
) -> dict[str, object]:
    """The ``quantization_config`` that the type's library writes.

    ``modules``: see ``quantized_modules``; unquantized ones are listed where the consumer looks for them. ``dtype``:
    the model's, in torch's spelling.
    """
    return _packing(settings.type).quantization_config(settings, modules, dtype)


def siblings(type_name: str) -> tuple[str, ...]:
    """The types that may stand in one folder with a type: those of its library."""
    return _packing(type_name).types


def config_entries(
    settings: Settings,
    modules: Mapping[str, bool] = _NO_MODULES,
    *,
    dtype: str = "bfloat16",
    types: Mapping[str, str] = _NO_TYPES,
) -> dict[str, object]:
    """The entries of config.json that describe the quantization; arguments as of ``quantization_config``. ``types``:
    of the quantized modules, where they have several.
    """
    config = quantization_config(settings, modules, dtype=dtype)
    if types:
        config |= _packing(settings.type).mixed_entries(settings, types)
    return dict.fromkeys(_packing(settings.type).config_keys, config)


def more_files(settings: Settings, modules: Mapping[str, bool]) -> dict[str, object]:
    """Further JSON files beside config.json: name to content."""
    return _packing(settings.type).more_files(settings, modules)


def metadata(type_name: str, tensors: Iterable[tuple[str, tuple[int, ...], Encoder]]) -> dict[str, str]:
    """The metadata of the safetensors files, from the name, shape and encoder of every tensor."""
    return _packing(type_name).metadata(tensors)


def _packing(type_name: str) -> Packing:
    try:
        return _BY_TYPE[type_name]
    except KeyError:
        raise UsageError(
            "quantize.type",
            f"a Hugging Face folder has no type {quoted(type_name)}",
            hint=choices.hint(type_name, TYPES),
        ) from None
