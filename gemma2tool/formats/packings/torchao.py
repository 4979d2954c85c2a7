"""torchao's types, as transformers saves them; how their weights are stored: ``torchao_weights``.

Written are int8 and float8 with a scale for each row, for activations as they are or quantized while the model runs,
int4 in bytes for activations in int8, and int4 packed in the order of the matrix (``plain``), which torchao's kernels
on a GPU and vLLM take. The library rebuilds its tensors from the safetensors metadata, which has an entry for every
parameter. Checked against torchao 0.18.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

from gemma2tool.errors import InputRefused
from gemma2tool.formats.packings import torchao_weights
from gemma2tool.formats.packings.base import Packing, QuantizedWeight
from gemma2tool.formats.packings.parts import (
    check_group_size,
    is_linear_weight,
    model_dtype,
    modules_not_converted,
    quantized_dtype,
)
from gemma2tool.formats.packings.settings import Settings
from gemma2tool.formats.packings.torchao_weights import SCALES
from gemma2tool.model.lazy import BFLOAT16, LazyTensor
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers import torchao
from gemma2tool.quantizers.base import Encoder

INT8, INT8_DYNAMIC, FP8, FP8_DYNAMIC = "torchao-int8", "torchao-int8-dynamic", "torchao-fp8", "torchao-fp8-dynamic"
INT4, INT8_INT4 = torchao.Int4.name, torchao.UnpackedInt4.name
_ROCM_TILE = 16

_PER_ROW = {"_data": {"dim": -1}, "_type": "PerRow", "_version": 1}
_FLOAT8 = {"_data": "float8_e4m3fn", "_type": "torch.dtype"}


class TorchaoPacking(Packing):
    method = "torchao"
    title = "torchao"
    types = (INT8, INT8_DYNAMIC, FP8, FP8_DYNAMIC, INT4, INT8_INT4)

    def quantization_config(self, settings: Settings, modules: Mapping[str, bool], dtype: str) -> dict[str, object]:
        return {
            "include_input_output_embeddings": False,
            "modules_to_not_convert": modules_not_converted(modules),
            "quant_method": self.method,
            "quant_type": {"default": _quant_type(settings)},
            "untie_embedding_weights": False,
        }

    def encoder_for(self, spec: TensorSpec, settings: Settings, source: LazyTensor) -> Encoder | None:
        if not is_linear_weight(spec):
            return None
        dtype = quantized_dtype(source)
        if settings.type in (INT4, INT8_INT4):
            group_size = _group_size(settings)
            check_group_size(spec, group_size)
            return (torchao.Int4 if settings.type == INT4 else torchao.UnpackedInt4)(dtype, group_size)
        if settings.type in (FP8, FP8_DYNAMIC):
            return torchao.Float8(settings.type, dtype)
        return torchao.Int8WeightOnly(settings.type, dtype)

    def remarks(self, encoders: Mapping[str, Encoder]) -> list[str]:
        for encoder in encoders.values():
            is_bfloat16 = isinstance(encoder, torchao.Int4) or encoder.name == FP8_DYNAMIC
            dtype = getattr(encoder, "dtype", BFLOAT16)
            if is_bfloat16 and dtype != BFLOAT16:
                return [
                    f"{encoder.name}: torchao's kernels compute in bfloat16, and the model is {dtype.name}: add --dtype"
                    " bf16"
                ]
        return []

    def metadata(self, tensors: Iterable[tuple[str, tuple[int, ...], Encoder]]) -> dict[str, str]:
        """The library cannot load the file without these entries."""
        entries = {name: json.dumps(_entry(shape, encoder)) for name, shape, encoder in tensors}
        return {**super().metadata(tensors), "tensor_names": json.dumps(list(entries)), **entries}

    def unpack(
        self, raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object], metadata: Mapping[str, str]
    ) -> dict[str, LazyTensor]:
        _refuse_rocm_tiles(quantization_config)
        return self.with_unquantized(raw, _weights(raw, metadata))

    def weights(
        self, raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object]
    ) -> Iterator[QuantizedWeight]:
        return _weights(raw, {})


def _weights(raw: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> Iterator[QuantizedWeight]:
    dtype = model_dtype({name: tensor for name, tensor in raw.items() if not name.endswith(SCALES)})
    for module in torchao_weights.quantized_modules(raw):
        yield torchao_weights.weight(raw, module, torchao_weights.read_layout(metadata, module), dtype)


def _refuse_rocm_tiles(quantization_config: Mapping[str, object]) -> None:
    """An AMD GPU's tiles have the shape of others, and another order."""
    quant_type = quantization_config.get("quant_type")
    default = quant_type.get("default") if isinstance(quant_type, Mapping) else None
    data = default.get("_data") if isinstance(default, Mapping) else None
    if isinstance(data, Mapping) and data.get("int4_tile_packed_ntile") == _ROCM_TILE:
        raise InputRefused("torchao.layout", "config.json: int4 in the tiles of AMD's GPUs (int4_tile_packed_ntile 16)")


def _group_size(settings: Settings) -> int:
    return settings.group_size_or(128 if settings.type == INT4 else 32)


def _quant_type(settings: Settings) -> dict[str, object]:
    """The configuration of torchao that quantizes to the type, as it writes it."""
    name, data = {
        INT8: ("Int8WeightOnlyConfig", {"granularity": _PER_ROW, "group_size": None, "set_inductor_config": True}),
        INT8_DYNAMIC: ("Int8DynamicActivationInt8WeightConfig", _int8_dynamic()),
        FP8: (
            "Float8WeightOnlyConfig",
            {"granularity": _PER_ROW, "set_inductor_config": True, "weight_dtype": _FLOAT8},
        ),
        FP8_DYNAMIC: ("Float8DynamicActivationFloat8WeightConfig", _float8_dynamic()),
        INT4: ("Int4WeightOnlyConfig", _int4(_group_size(settings))),
        INT8_INT4: ("Int8DynamicActivationIntxWeightConfig", _int8_int4(_group_size(settings))),
    }[settings.type]
    return {"_data": data, "_type": name, "_version": 2}


def _int8_dynamic() -> dict[str, object]:
    return {
        "act_mapping_type": _of("MappingType", "SYMMETRIC"),
        "granularity": _PER_ROW,
        "reduce_range": False,
        "set_inductor_config": True,
        "weight_only_decode": False,
    }


def _float8_dynamic() -> dict[str, object]:
    products = {"emulate": False, "pad_inner_dim": False, "use_fast_accum": True}
    return {
        "activation_dtype": _FLOAT8,
        "activation_value_lb": None,
        "activation_value_ub": None,
        "alg_id": 0,
        "granularity": [_PER_ROW, _PER_ROW],
        "kernel_preference": _of("KernelPreference", "AUTO"),
        "mm_config": {"_data": products, "_type": "Float8MMConfig", "_version": 1},
        "packing_format": _of("Float8PackingFormat", "PLAIN"),
        "set_inductor_config": True,
        "weight_dtype": _FLOAT8,
    }


def _int4(group_size: int) -> dict[str, object]:
    return {
        "group_size": group_size,
        "int4_choose_qparams_algorithm": _of("Int4ChooseQParamsAlgorithm", "TINYGEMM"),
        "int4_packing_format": _of("Int4PackingFormat", "PLAIN"),
        "int4_tile_packed_ntile": 8,
        "set_inductor_config": True,
    }


def _int8_int4(group_size: int) -> dict[str, object]:
    return {
        "act_mapping_type": _of("MappingType", "ASYMMETRIC"),
        "intx_choose_qparams_algorithm": _of("IntxChooseQParamsAlgorithm", "AFFINE"),
        "intx_packing_format": _of("IntxPackingFormat", "UNPACKED_TO_INT8"),
        "weight_dtype": _dtype("int4"),
        "weight_granularity": {"_data": {"group_size": group_size}, "_type": "PerGroup", "_version": 1},
        "weight_mapping_type": _of("MappingType", "SYMMETRIC"),
        "weight_scale_dtype": None,
    }


def _entry(shape: tuple[int, ...], encoder: Encoder) -> dict[str, object]:
    """What the metadata say of one parameter."""
    if isinstance(encoder, torchao.Int8WeightOnly):
        inputs = _int8_inputs() if encoder.name == INT8_DYNAMIC else None
        data: dict[str, object] = {"act_quant_kwargs": inputs, "reduce_range": False, "block_size": [1, shape[1]]}
        return _tensor("Int8Tensor", data | {"dtype": _dtype(encoder.dtype.name)}, "zero_point", "qdata", "scale")
    if isinstance(encoder, torchao.Float8):
        is_dynamic = encoder.name == FP8_DYNAMIC
        data = {
            "block_size": [1, shape[1]],
            "mm_config": _of("Float8MMConfig", emulate=False, use_fast_accum=True, pad_inner_dim=False)
            if is_dynamic
            else None,
            "act_quant_kwargs": _float8_inputs() if is_dynamic else None,
            "kernel_preference": _of("KernelPreference", "AUTO"),
            "dtype": _dtype(encoder.dtype.name),
        }
        return _tensor("Float8Tensor", data, "qdata", "scale")
    if isinstance(encoder, torchao.UnpackedInt4):
        data = {"target_dtype": _dtype("int4"), "block_size": [1, encoder.group_size]}
        data |= {"dtype": _dtype(encoder.dtype.name), "activation_quantization": "int8_asym_per_token"}
        return _tensor(torchao_weights.UNPACKED, data, "qdata", "scale", "zero_point")
    if isinstance(encoder, torchao.Int4):
        data = {"activation_dtype": _dtype("bfloat16"), "block_size": [1, encoder.group_size], "shape": [*shape]}
        return _tensor("Int4Tensor", data, "qdata", "scale", "zero_point")
    return {"_type": "Tensor"}


def _tensor(kind: str, data: dict[str, object], *parts: str) -> dict[str, object]:
    return {"_type": kind, "_data": data, "_tensor_data_names": [*parts]}


def _int8_inputs() -> dict[str, object]:
    """How the inputs of ``torchao-int8-dynamic`` are quantized."""
    return _of(
        "QuantizeTensorToInt8Kwargs",
        granularity=_of("PerRow", dim=-1),
        mapping_type=_of("MappingType", "SYMMETRIC"),
        reduce_range=False,
    )


def _float8_inputs() -> dict[str, object]:
    """How the inputs of ``torchao-fp8-dynamic`` are quantized."""
    return _of(
        "QuantizeTensorToFloat8Kwargs",
        float8_dtype=_dtype("float8_e4m3fn"),
        granularity=_of("PerRow", dim=-1),
        mm_config=None,
        hp_value_lb=None,
        hp_value_ub=None,
        kernel_preference=_of("KernelPreference", "AUTO"),
    )


def _of(kind: str, value: str | None = None, **fields: object) -> dict[str, object]:
    """An object as the metadata spell it, a member of an enumeration or one with fields."""
    return {"_type": kind, "_data": fields if value is None else value}


def _dtype(name: str) -> dict[str, object]:
    return _of("torch.dtype", name)
