"""Packings: quantized checkpoints on top of the Hugging Face format.

A packing stores some weights as other tensors beside each other (codes, scales, ...) and says so in ``quantization_config``. Each is
a module here with ``METHOD`` (the config's ``quant_method``), ``TYPES`` (names of the types it writes) and the three functions below.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.packings import awq, bnb, compressed_tensors, gptq, mlx, torchao
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


def encoder_for(spec: TensorSpec, type_name: str, *, double_quant: bool, source: LazyTensor) -> Encoder | None:
    """What stores the tensor in this type; None where it keeps the model's own type.

    ``source`` has the type the weight is quantized from. With ``double_quant`` it is read once here: how long the stored parts
    are depends on its values.
    """
    return _packing(type_name).encoder_for(spec, type_name, double_quant=double_quant, source=source)


def quantization_config(type_name: str, *, double_quant: bool, compute_dtype: str = "bfloat16") -> dict[str, object]:
    """The ``quantization_config`` that transformers 5.23 writes for this type. ``compute_dtype`` in torch's spelling."""
    return _packing(type_name).quantization_config(type_name, double_quant=double_quant, compute_dtype=compute_dtype)


def config_entries(type_name: str, *, double_quant: bool) -> dict[str, object]:
    """What config.json says about the quantization: ``quantization_config``, and MLX's second name for it."""
    config = quantization_config(type_name, double_quant=double_quant)
    if _packing(type_name) is mlx:
        return {"quantization": config, "quantization_config": config}
    return {"quantization_config": config}


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
