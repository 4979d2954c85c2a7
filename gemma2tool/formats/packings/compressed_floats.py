"""compressed-tensors' microscaling types: P.weight_packed (two float4 codes a byte) or P.weight (float8),
P.weight_scale (bytes), and of nvfp4 P.weight_global_scale, one for each tensor.

With quantized activations, nvfp4 has P.input_global_scale too; the weights are the same. Checked against
compressed-tensors 0.20 and llm-compressor 0.14.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.formats.packings.base import QuantizedWeight
from gemma2tool.formats.packings.parts import (
    HINT,
    UINT8,
    check_group_size,
    quantized_dtype,
    required_matrix,
    required_part,
)
from gemma2tool.formats.packings.selection import fused_weights
from gemma2tool.model.lazy import BFLOAT16, FLOAT32, Array, LazyTensor
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers import compressed_floats
from gemma2tool.quantizers.base import Encoder
from gemma2tool.quantizers.bitpack import unpack_nibbles
from gemma2tool.quantizers.compressed_floats import FLOAT_SCHEMES, CompressedFloats, FloatScheme
from gemma2tool.quantizers.float_codes import FP8
from gemma2tool.storage.quoting import quoted

_PACKED, _SCALE, _TENSOR_SCALE = ".weight_packed", ".weight_scale", ".weight_global_scale"
_LAYOUTS = {
    "nvfp4a16": "nvfp4-pack-quantized",
    "mxfp4a16": "mxfp4-pack-quantized",
    "mxfp8a16": "mxfp8-quantized",
}


def config_group(type_name: str) -> dict[str, object]:
    """The entry of ``config_groups`` as llm-compressor writes it."""
    scheme = FLOAT_SCHEMES[type_name]
    return {
        "format": _LAYOUTS[type_name],
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": {
            "dynamic": False,
            "group_size": scheme.group_size,
            "num_bits": scheme.bits,
            "scale_dtype": "torch.float8_e4m3fn" if scheme.has_tensor_scale else "torch.uint8",
            "strategy": "tensor_group" if scheme.has_tensor_scale else "group",
            "symmetric": True,
            "type": "float",
        },
    }


def encoder_for(type_name: str, spec: TensorSpec, source: LazyTensor) -> CompressedFloats:
    """The encoder of a linear layer's weight; of nvfp4, ``source`` is read once. Raises ``UsageError`` for rows that
    do not divide into groups.
    """
    check_group_size(spec, FLOAT_SCHEMES[type_name].group_size)
    return CompressedFloats(type_name, quantized_dtype(source)).surveyed(source)


def with_shared_scales(encoders: Mapping[str, Encoder]) -> dict[str, Encoder]:
    """The encoders, where those of tensors that engines run as one matrix have one tensor scale."""
    shared = dict(encoders)
    for names in fused_weights(encoders):
        own = {name: encoder for name in names if isinstance(encoder := encoders[name], CompressedFloats)}
        absmax = max((encoder.absmax for encoder in own.values()), default=0.0)
        shared |= {name: replace(encoder, absmax=absmax) for name, encoder in own.items()}
    return shared


def read_scheme(weights: Mapping[str, object]) -> tuple[str, FloatScheme] | None:
    """The type and the scheme of a config's ``weights``; None if they are of another kind."""
    if weights.get("type") != "float":
        return None
    for name, scheme in FLOAT_SCHEMES.items():
        is_of_bytes = scheme.bits == 4 or "uint8" in str(weights.get("scale_dtype"))
        if (weights.get("num_bits"), weights.get("group_size")) == (scheme.bits, scheme.group_size) and is_of_bytes:
            return name, scheme
    return None


def weight(raw: Mapping[str, LazyTensor], module: str, type_name: str, scheme: FloatScheme) -> QuantizedWeight:
    """A module's weight of this scheme. Raises ``InputRefused`` for parts that are missing or do not fit."""
    suffix, dtypes = (_PACKED, (UINT8,)) if scheme.bits == 4 else (".weight", (FP8,))
    codes = required_matrix(raw, module + suffix, dtypes)
    shape = (codes.shape[0], codes.shape[1] * 8 // scheme.bits)
    if shape[1] % scheme.group_size:
        raise InputRefused(
            "packing.part-shape",
            f"{codes.origin}: {shape[1]} columns are not a multiple of the group size {scheme.group_size}",
            hint=HINT,
        )
    scale_dtype = FP8 if scheme.has_tensor_scale else UINT8
    groups = (shape[0], shape[1] // scheme.group_size)
    parts = {module + suffix, module + _SCALE}
    scales, of_tensor = required_part(raw, module + _SCALE, (scale_dtype,), groups), 1.0
    if scheme.has_tensor_scale:
        of_tensor = _positive(required_part(raw, module + _TENSOR_SCALE, (FLOAT32,), None))
        parts.add(module + _TENSOR_SCALE)
        if (inputs := raw.get(f"{module}.input_global_scale")) is not None:
            _positive(inputs)
            parts.add(f"{module}.input_global_scale")
    tensor = FloatCodesTensor(codes, scales, of_tensor, type_name)
    return QuantizedWeight(f"{module}.weight", tensor, parts)


def _positive(scale: LazyTensor) -> float:
    """The value of a scale. Raises ``InputRefused`` for what cannot be one: memory that was never initialized."""
    values = scale.load().reshape(-1).astype(np.float32)
    if len(values) != 1 or not np.isfinite(values[0]) or values[0] <= 0:
        raise InputRefused(
            "packing.part-shape",
            f"{scale.origin}: is {quoted(values[:2].tolist())}, expected one positive number",
            hint=HINT,
        )
    return float(values[0])


class FloatCodesTensor(LazyTensor):
    """A weight (O, I) in bfloat16, as the library decompresses it."""

    dtype = BFLOAT16

    def __init__(self, codes: LazyTensor, scales: LazyTensor, of_tensor: float, type_name: str) -> None:
        self.codes, self.scales, self.of_tensor = codes, scales, of_tensor
        self.scheme = FLOAT_SCHEMES[type_name]
        self.shape = (codes.shape[0], codes.shape[1] * 8 // self.scheme.bits)
        self.origin, self.stored, self.group_size = codes.origin, type_name, self.scheme.group_size

    def load_rows(self, first: int, last: int) -> Array:
        raw = self.codes.load_rows(first, last)
        codes = unpack_nibbles(raw) if self.scheme.bits == 4 else raw.view(np.uint8)
        scales = compressed_floats.stored_scales(self.scales.load_rows(first, last), self.scheme, self.of_tensor)
        return compressed_floats.dequantize(codes, scales, self.scheme)
