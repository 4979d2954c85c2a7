"""torchao's int8 weight-only type, as transformers saves it: P._weight_qdata, P._weight_scale, P._weight_zero_point.

The library rebuilds its tensors from the safetensors metadata, which has an entry for every parameter. Checked against
torchao 0.18.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

from gemma2tool.formats.packings.base import Packing, QuantizedWeight
from gemma2tool.formats.packings.parts import (
    INT8,
    is_linear_weight,
    model_dtype,
    modules_not_converted,
    quantized_dtype,
    required_part,
)
from gemma2tool.formats.packings.settings import Settings
from gemma2tool.model.lazy import FLOAT32, Array, DType, LazyTensor
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers import torchao
from gemma2tool.quantizers.base import Encoder

CODES = "._weight_qdata"


class TorchaoPacking(Packing):
    method = "torchao"
    title = "torchao"
    types = (torchao.Int8WeightOnly.name,)

    def quantization_config(self, settings: Settings, modules: Mapping[str, bool], dtype: str) -> dict[str, object]:
        granularity = {"_data": {"dim": -1}, "_type": "PerRow", "_version": 1}
        data = {"granularity": granularity, "group_size": None, "set_inductor_config": True}
        return {
            "include_input_output_embeddings": False,
            "modules_to_not_convert": modules_not_converted(modules),
            "quant_method": self.method,
            "quant_type": {"default": {"_data": data, "_type": "Int8WeightOnlyConfig", "_version": 2}},
            "untie_embedding_weights": False,
        }

    def encoder_for(self, spec: TensorSpec, settings: Settings, source: LazyTensor) -> Encoder | None:
        return torchao.Int8WeightOnly(quantized_dtype(source)) if is_linear_weight(spec) else None

    def metadata(self, tensors: Iterable[tuple[str, tuple[int, ...], Encoder]]) -> dict[str, str]:
        """The library cannot load the file without these entries."""
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
        return {**super().metadata(tensors), "tensor_names": json.dumps(list(entries)), **entries}

    def weights(
        self, raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object]
    ) -> Iterator[QuantizedWeight]:
        for name in raw:
            if not name.endswith(CODES):
                continue
            module = name.removesuffix(CODES)
            codes = required_part(raw, name, (INT8,), (raw[name].rows, raw[name].row_size))
            scales = required_part(raw, f"{module}._weight_scale", (FLOAT32,), (codes.rows, 1))
            parts = {name, f"{module}._weight_scale"}
            zero_points = None
            if f"{module}._weight_zero_point" in raw:
                zero_points = required_part(raw, f"{module}._weight_zero_point", (INT8,), (codes.rows, 1))
                parts.add(f"{module}._weight_zero_point")
            tensor = Int8Tensor(codes, scales, zero_points, model_dtype(raw))
            yield QuantizedWeight(f"{module}.weight", tensor, parts)


class Int8Tensor(LazyTensor):
    """A weight (O, I) in the model's type: (code - zero point) * scale in float32, rounded to that type."""

    def __init__(self, codes: LazyTensor, scales: LazyTensor, zero_points: LazyTensor | None, dtype: DType) -> None:
        self.codes, self.scales, self.zero_points = codes, scales, zero_points
        self.shape, self.dtype, self.origin = codes.shape, dtype, codes.origin
        self.stored = torchao.Int8WeightOnly.name

    def load_rows(self, first: int, last: int) -> Array:
        zero_points = None if self.zero_points is None else self.zero_points.load_rows(first, last)
        codes, scales = self.codes.load_rows(first, last), self.scales.load_rows(first, last)
        return torchao.dequantize(codes, scales, self.dtype, zero_points)
