"""torchao's int8 weight-only type, as transformers saves it: P._weight_qdata, P._weight_scale, P._weight_zero_point.

The library rebuilds its tensors from the safetensors metadata, an entry for every parameter: see ``metadata``. Checked against
torchao 0.18.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import numpy as np

from gemma2tool.formats.packings.parts import FLOATS, linear_weight, model_dtype, part, plain, skip_list
from gemma2tool.formats.packings.settings import Settings
from gemma2tool.model.lazy import FLOAT32, LazyTensor
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers import torchao
from gemma2tool.quantizers.base import Encoder

METHOD = "torchao"
TYPES = ("torchao-int8",)

CODES = "._weight_qdata"
INT8 = np.dtype(np.int8)


def quantization_config(settings: Settings, modules: Mapping[str, bool], dtype: str) -> dict[str, object]:
    granularity = {"_data": {"dim": -1}, "_type": "PerRow", "_version": 1}
    data = {"granularity": granularity, "group_size": None, "set_inductor_config": True}
    return {
        "include_input_output_embeddings": False,
        "modules_to_not_convert": skip_list(modules),
        "quant_method": METHOD,
        "quant_type": {"default": {"_data": data, "_type": "Int8WeightOnlyConfig", "_version": 2}},
        "untie_embedding_weights": False,
    }


def encoder_for(spec: TensorSpec, settings: Settings, source: LazyTensor) -> Encoder | None:
    if not linear_weight(spec):
        return None
    return torchao.Int8WeightOnly(source.dtype if source.dtype in FLOATS else FLOAT32)


def metadata(tensors: Iterable[tuple[str, tuple[int, ...], Encoder]]) -> dict[str, str]:
    """The safetensors metadata without which the library cannot load the file; see ``packings.metadata``."""
    entries = {}
    for name, shape, encoder in tensors:
        entries[name] = '{"_type": "Tensor"}'
        if isinstance(encoder, torchao.Int8WeightOnly):
            data = {
                "act_quant_kwargs": None,
                "reduce_range": False,
                "block_size": [1, shape[1]],
                "dtype": {"_type": "torch.dtype", "_data": encoder.dtype.name},
            }
            names = ["zero_point", "qdata", "scale"]
            entries[name] = json.dumps({"_type": "Int8Tensor", "_data": data, "_tensor_data_names": names})
    return {"format": "pt", "tensor_names": json.dumps(list(entries)), **entries}


def unpack(raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object]) -> dict[str, LazyTensor]:
    quantized: dict[str, LazyTensor] = {}
    taken: set[str] = set()
    for name in raw:
        if not name.endswith(CODES):
            continue
        module = name.removesuffix(CODES)
        codes = part(raw, name, (INT8,), (raw[name].rows, raw[name].row_size))
        scales = part(raw, module + "._weight_scale", (FLOAT32,), (codes.rows, 1))
        parts = {name, module + "._weight_scale"}
        zero_points = None
        if module + "._weight_zero_point" in raw:
            zero_points = part(raw, module + "._weight_zero_point", (INT8,), (codes.rows, 1))
            parts.add(module + "._weight_zero_point")
        quantized[module + ".weight"] = Int8Tensor(codes, scales, zero_points, model_dtype(raw))
        taken |= parts
    return {**plain(raw, taken, METHOD), **quantized}


class Int8Tensor(LazyTensor):
    """A weight (O, I) in the model's type: (code - zero point) * scale in float32, rounded to it."""

    def __init__(self, codes: LazyTensor, scales: LazyTensor, zero_points: LazyTensor | None, dtype: np.dtype) -> None:
        self.codes, self.scales, self.zero_points = codes, scales, zero_points
        self.shape, self.dtype, self.stored, self.origin = codes.shape, dtype, "torchao-int8", codes.origin

    def load_rows(self, first: int, last: int) -> np.ndarray:
        zero_points = None if self.zero_points is None else self.zero_points.load_rows(first, last)
        codes, scales = self.codes.load_rows(first, last), self.scales.load_rows(first, last)
        return torchao.dequantize(codes, scales, self.dtype, zero_points)
