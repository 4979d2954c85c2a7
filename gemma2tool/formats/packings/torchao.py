"""torchao's types, as transformers saves them: P._weight_qdata, P._weight_scale, P._weight_zero_point.

int8 weights with a scale for each row are written. Read are all layouts with one code in an element, int8 or float8,
and a scale for the tensor, for each row or for groups of columns. The library rebuilds its tensors from the safetensors
metadata, which has an entry for every parameter. Checked against torchao 0.18.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.formats.packings.base import Packing, QuantizedWeight
from gemma2tool.formats.packings.parts import (
    FLOATS,
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
from gemma2tool.quantizers.float_codes import FP8

CODES = "._weight_qdata"
SCALES = "._weight_scale"


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
        dtype = model_dtype({name: tensor for name, tensor in raw.items() if not name.endswith(SCALES)})
        for name in raw:
            if name.endswith(CODES):
                yield _weight(raw, name.removesuffix(CODES), dtype)


def _weight(raw: Mapping[str, LazyTensor], module: str, dtype: DType) -> QuantizedWeight:
    codes, scales = raw[module + CODES], required_part(raw, module + SCALES, FLOATS, None)
    rows, columns = codes.rows, codes.row_size
    if codes.dtype not in (INT8, FP8) or len(codes.shape) != 2 or not _fits(scales.shape, rows, columns):
        raise InputRefused(
            "torchao.layout",
            f"{codes.origin}: {codes.dtype.name} codes of shape {codes.shape} with scales of shape {scales.shape}",
            hint="only int8 and float8 layouts with one code in an element are read: load the model with torchao,"
            " dequantize it and save it again",
        )
    parts = {module + CODES, module + SCALES}
    zero_points = None
    if f"{module}._weight_zero_point" in raw:
        zero_points = required_part(raw, f"{module}._weight_zero_point", (INT8,), scales.shape)
        parts.add(f"{module}._weight_zero_point")
    return QuantizedWeight(f"{module}.weight", CodesTensor(codes, scales, zero_points, dtype), parts)


def _fits(scales: tuple[int, ...], rows: int, columns: int) -> bool:
    """Whether scales of this shape are for the whole tensor, or for rows in groups of equal length."""
    if scales in ((), (1,), (1, 1)):
        return True
    return len(scales) == 2 and scales[0] == rows and scales[1] > 0 and columns % scales[1] == 0


class CodesTensor(LazyTensor):
    """A weight (O, I) in the model's type: (code - zero point) * scale in float32, rounded to that type."""

    def __init__(self, codes: LazyTensor, scales: LazyTensor, zero_points: LazyTensor | None, dtype: DType) -> None:
        self.codes, self.scales, self.zero_points = codes, scales, zero_points
        self.shape, self.dtype, self.origin = codes.shape, dtype, codes.origin
        self.is_whole = scales.size == 1 and codes.rows != 1
        self.group_size = None if self.is_whole else self.shape[1] // scales.row_size
        self.stored = self._stored_name()

    def _stored_name(self) -> str:
        """A type whose limits are known, or "torchao": IntxUnpackedToInt8Tensor's scales are of the model's type, and
        its codes may have fewer than 8 bits."""
        if self.is_whole:
            return "torchao"
        if self.codes.dtype == FP8:
            return "torchao-fp8"
        return torchao.Int8WeightOnly.name if self.scales.dtype == FLOAT32 else "torchao"

    def load_rows(self, first: int, last: int) -> Array:
        zero_points = None if self.zero_points is None else self._by_row(self.zero_points, first, last)
        codes, scales = self.codes.load_rows(first, last), self._by_row(self.scales, first, last)
        return torchao.dequantize(codes, scales, self.dtype, zero_points)

    def _by_row(self, stored: LazyTensor, first: int, last: int) -> Array:
        """Scales or zero points of a range of rows: (n, groups)."""
        if self.is_whole:
            return np.repeat(stored.load().reshape(1, 1), last - first, axis=0)
        return stored.load_rows(first, last).reshape(last - first, stored.row_size)
