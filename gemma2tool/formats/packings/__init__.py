"""Packings: quantized checkpoints on top of the Hugging Face format.

A packing stores some weights as other tensors beside each other (codes, scales, ...) and says so in ``quantization_config``. Each is
a module here with ``METHOD`` (the config's ``quant_method``), ``TYPES`` (names of the types it writes) and the three functions below.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from types import MappingProxyType

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.packings import awq, bnb, compressed_tensors, gptq, mlx, torchao
from gemma2tool.formats.packings.settings import Settings, asked_for, consumer_remarks, kept_by_choice, split_fusions
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers.base import Encoder
from gemma2tool.storage.quoting import quoted

_PACKINGS = (bnb, compressed_tensors, gptq, awq, torchao, mlx)
_BY_METHOD = {packing.METHOD: packing for packing in _PACKINGS}
_BY_TYPE = {type_name: packing for packing in _PACKINGS for type_name in packing.TYPES}

TYPES = tuple(_BY_TYPE)
"""Names of the quantization types that a Hugging Face folder can be written in."""


def part_name(name: str, suffix: str) -> str:
    """The name under which a part of the tensor ``name`` is stored.

    "" is the tensor itself, a suffix with a leading dot continues its name (``P.weight.absmax``), any other is its sibling in the
    same module (``P.SCB``).
    """
    if not suffix or suffix.startswith("."):
        return name + suffix
    return f"{name.rpartition('.')[0]}.{suffix}"


def unpack(raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object]) -> dict[str, LazyTensor]:
    """The canonical tensors of a quantized checkpoint, which dequantize the rows they are asked for.

    ``raw``: the tensors as the files name them. Unquantized ones are passed through. Raises InputRefused where a tensor's parts
    are missing, contradict one another, or carry a known fault.
    """
    method = quantization_config.get("quant_method") if isinstance(quantization_config, Mapping) else None
    if isinstance(quantization_config, Mapping) and mlx.recognizes(quantization_config):
        method = mlx.METHOD
    packing = _BY_METHOD.get(method) if isinstance(method, str) else None
    if packing is None:
        raise InputRefused(
            "packing.unknown",
            f"config.json: quantization_config has the quant_method {quoted(method)}",
            hint=f"known are: {', '.join(_BY_METHOD)}",
        )
    return packing.unpack(raw, quantization_config)


def encoder_for(spec: TensorSpec, settings: Settings, source: LazyTensor) -> Encoder | None:
    """What stores the tensor in this type; None where it keeps the model's own type, whatever the user asked for.

    ``source`` has the type the weight is quantized from. With double quantization it is read once here: how long the stored parts
    are depends on its values.
    """
    return _packing(settings.type).encoder_for(spec, settings, source)


def encoders(
    specs: Mapping[str, TensorSpec], sources: Mapping[str, LazyTensor], settings: Settings
) -> tuple[dict[str, Encoder], list[str]]:
    """The encoders of all tensors that are to be quantized, by name, and remarks on the choice.

    Raises UsageError for patterns that match nothing, and where nothing would be quantized.
    """
    kept = kept_by_choice(specs, settings)
    found = {
        name: encoder
        for name, spec in specs.items()
        if name not in kept and (encoder := encoder_for(spec, settings, sources[name])) is not None
    }
    if not found:
        raise UsageError(
            "quantize.nothing",
            f"nothing would be quantized to {settings.type}",
            hint="--skip and --only leave no weight that the type can hold",
        )
    remarks = consumer_remarks(settings)
    for name, spec in specs.items():
        if spec.quantizable and name not in found and asked_for(name, settings):
            remarks.append(f"{name} stays as it is: what loads {settings.type} cannot load it quantized")
    modules = quantized_modules(specs, found)
    partial = split_fusions((m for m, on in modules.items() if on), (m for m, on in modules.items() if not on))
    if partial and _packing(settings.type) is not mlx:
        remarks.append(
            f"{', '.join(partial[:3])}{' ...' if len(partial) > 3 else ''}: left as they are while others of q, k and v, or of gate and up,"
            " are quantized; transformers loads that, vLLM, which fuses them, does not"
        )
    return found, remarks


def quantized_modules(specs: Mapping[str, TensorSpec], quantized: Container[str]) -> dict[str, bool]:
    """The model's linear layers by module name, and whether each is quantized."""
    return {
        name.removesuffix(".weight"): name in quantized
        for name, spec in specs.items()
        if spec.quantizable and spec.layer is not None
    }


def quantization_config(
    settings: Settings, modules: Mapping[str, bool] = MappingProxyType({}), *, dtype: str = "bfloat16"
) -> dict[str, object]:
    """The ``quantization_config`` that the type's library writes.

    ``modules``: see ``quantized_modules``; those that are not quantized are listed where the consumer looks for them. ``dtype``: the
    model's, in torch's spelling.
    """
    return _packing(settings.type).quantization_config(settings, modules, dtype)


def config_entries(
    settings: Settings, modules: Mapping[str, bool] = MappingProxyType({}), *, dtype: str = "bfloat16"
) -> dict[str, object]:
    """What config.json says about the quantization: ``quantization_config``, and MLX's second name for it."""
    config = quantization_config(settings, modules, dtype=dtype)
    if _packing(settings.type) is mlx:
        return {"quantization": config, "quantization_config": config}
    return {"quantization_config": config}


def more_files(settings: Settings, modules: Mapping[str, bool]) -> dict[str, object]:
    """Further JSON files beside config.json, by name: GPTQ's libraries look for quantize_config.json first."""
    if _packing(settings.type) is gptq:
        return {gptq.CONFIG_FILE: gptq.quantization_config(settings, modules, "bfloat16")}
    return {}


def metadata(type_name: str, tensors: Iterable[tuple[str, tuple[int, ...], Encoder]]) -> dict[str, str]:
    """The metadata of the safetensors files, from every tensor's name, shape and encoder."""
    packing = _packing(type_name)
    if packing is torchao:
        return torchao.metadata(tensors)
    return {"format": "mlx" if packing is mlx else "pt"}


def _packing(type_name: str):
    try:
        return _BY_TYPE[type_name]
    except KeyError:
        raise UsageError(
            "quantize.type",
            f"a Hugging Face folder has no type {quoted(type_name)}",
            hint=f"one of: {', '.join(TYPES)}",
        ) from None
