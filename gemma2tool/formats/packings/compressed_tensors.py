"""compressed-tensors: what llm-compressor writes and vLLM serves.

Depending on the scheme, a weight P.weight is stored as P.weight (int8 or float8), or P.weight_packed with
P.weight_shape; and P.weight_scale, P.weight_zero_point, P.weight_g_idx (act-order) and P.input_scale (static
activations). The types whose codes are floats in small groups are in ``compressed_floats``. Checked against
compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.formats.options import WHOLE_ROW
from gemma2tool.formats.packings import compressed_floats, listed
from gemma2tool.formats.packings.base import Packing, QuantizedWeight
from gemma2tool.formats.packings.compressed_groups import Groups, mixed_groups
from gemma2tool.formats.packings.compressed_scheme import WeightScheme, read_weight_scheme
from gemma2tool.formats.packings.parts import (
    FLOATS,
    HINT,
    INT8,
    INT32,
    INT64,
    check_group_size,
    is_linear_weight,
    quantized_dtype,
    required_part,
)
from gemma2tool.formats.packings.settings import Settings
from gemma2tool.model.lazy import Array, DType, LazyTensor, to_float32
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers import compressed
from gemma2tool.quantizers.base import Encoder
from gemma2tool.quantizers.bitpack import WORD_BITS
from gemma2tool.quantizers.compressed import SCHEMES, Compressed, Scheme
from gemma2tool.quantizers.compressed_floats import FLOAT_SCHEMES
from gemma2tool.quantizers.float_codes import FP8
from gemma2tool.storage.quoting import quoted

VERSION = "0.20.0"
PRESETS = {"w8a8-int8": "INT8"}
"""llm-compressor's names for the types, if they are not the type's own in capitals."""
FLOAT8_INPUTS = ("w4afp8",)
"""Types of packed integers that are multiplied by activations in float8."""
SCALE = ".weight_scale"


class CompressedTensorsPacking(Packing):
    method = "compressed-tensors"
    title = "compressed-tensors"
    types = (*SCHEMES, *FLOAT_SCHEMES)

    def quantization_config(self, settings: Settings, modules: Mapping[str, bool], dtype: str) -> dict[str, object]:
        """As llm-compressor writes it. Activations of the 8-bit types are quantized while the model runs."""
        preset = PRESETS.get(settings.type, settings.type.upper().replace("-", "_"))
        group = _group(settings)
        unquantized = [name for name, is_quantized in modules.items() if not is_quantized]
        return {
            "config_groups": {preset: group},
            "format": group["format"],
            "global_compression_ratio": None,
            "ignore": ["lm_head", "model.embed_tokens", *unquantized],
            "kv_cache_scheme": None,
            "moe_sparsity_config": None,
            "quant_method": self.method,
            "quantization_status": "compressed",
            "transform_config": {},
            "version": VERSION,
        }

    def mixed_entries(self, settings: Settings, types: Mapping[str, str]) -> dict[str, object]:
        """A group for each type, with the modules that have it as its targets."""
        own = {type_name: _group(replace(settings, type=type_name)) for type_name in dict.fromkeys(types.values())}
        return mixed_groups(own, types)

    def misread(
        self, modules: Collection[str], default: Collection[str], quantization_config: Mapping[str, object]
    ) -> Collection[str]:
        return listed.compressed(modules, quantization_config)

    def encoder_for(self, spec: TensorSpec, settings: Settings, source: LazyTensor) -> Encoder | None:
        if not is_linear_weight(spec):
            return None
        if settings.type in FLOAT_SCHEMES:
            return compressed_floats.encoder_for(settings.type, spec, source)
        scheme = _scheme_for(settings)
        if scheme.block_rows == 1 and scheme.group_size:
            check_group_size(spec, scheme.group_size)
        variant = None if scheme == SCHEMES[settings.type] else scheme
        return Compressed(settings.type, quantized_dtype(source), variant)

    def together(self, encoders: Mapping[str, Encoder]) -> Mapping[str, Encoder]:
        return compressed_floats.with_shared_scales(encoders)

    def weights(
        self, raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object]
    ) -> Iterator[QuantizedWeight]:
        groups = Groups(quantization_config)
        for name in raw:
            if name.endswith(SCALE):
                module = name.removesuffix(SCALE)
                arguments = groups.weights_of(module)
                floats = compressed_floats.read_scheme(arguments)
                if floats is not None:
                    yield compressed_floats.weight(raw, module, *floats)
                else:
                    yield _weight(_ModuleParts(raw, module), read_weight_scheme(arguments))


def _group(settings: Settings) -> dict[str, object]:
    """The entry of ``config_groups`` for the type, of all linear layers."""
    if settings.type in FLOAT_SCHEMES:
        return compressed_floats.config_group(settings.type)
    scheme = _scheme_for(settings)
    return {
        "format": "pack-quantized" if scheme.packed else f"{scheme.kind}-quantized",
        "input_activations": _activation_arguments(settings.type, scheme),
        "output_activations": None,
        "targets": ["Linear"],
        "weights": _weight_arguments(scheme),
    }


def _scheme_for(settings: Settings) -> Scheme:
    scheme = SCHEMES[settings.type]
    group_size = settings.options.group_size
    return scheme if group_size is None else replace(scheme, group_size=None if group_size == WHOLE_ROW else group_size)


def _weight_arguments(scheme: Scheme) -> dict[str, object]:
    strategy = "block" if scheme.block_rows > 1 else "group" if scheme.group_size else "channel"
    arguments: dict[str, object] = {
        "dynamic": False,
        "group_size": scheme.group_size if strategy == "group" else None,
        "num_bits": scheme.bits,
        "strategy": strategy,
        "symmetric": scheme.symmetric,
        "type": scheme.kind,
    }
    return arguments | ({"block_structure": [scheme.block_rows, scheme.group_size]} if strategy == "block" else {})


def _activation_arguments(type_name: str, scheme: Scheme) -> dict[str, object] | None:
    """How activations are quantized while the model runs; None if they are not."""
    if scheme.packed and type_name not in FLOAT8_INPUTS:
        return None
    is_block = scheme.block_rows > 1
    return {
        "dynamic": True,
        "group_size": scheme.group_size if is_block else None,
        "num_bits": 8,
        "strategy": "group" if is_block else "token",
        "symmetric": True,
        "type": "float" if type_name in FLOAT8_INPUTS else scheme.kind,
    }


@dataclass
class _ModuleParts:
    """The stored tensors of one module by the end of their names, and the names of those that were taken."""

    raw: Mapping[str, LazyTensor]
    module: str
    taken: set[str] = field(default_factory=set)

    def has(self, suffix: str) -> bool:
        return self.module + suffix in self.raw

    def required(self, suffix: str, dtypes: tuple[DType, ...], shape: tuple[int, ...] | None = None) -> LazyTensor:
        tensor = required_part(self.raw, self.module + suffix, dtypes, shape)
        self.taken.add(self.module + suffix)
        return tensor

    def optional(
        self, suffix: str, dtypes: tuple[DType, ...], shape: tuple[int, ...] | None = None
    ) -> LazyTensor | None:
        return self.required(suffix, dtypes, shape) if self.has(suffix) else None


def _weight(parts: _ModuleParts, declared: WeightScheme) -> QuantizedWeight:
    packed = parts.has(".weight_packed")
    codes, shape = _packed_codes(parts, declared) if packed else _plain_codes(parts, declared)
    scales = parts.required(SCALE, FLOATS)
    scheme = declared.for_weight(scales, shape, packed)
    _check_input_scale(parts.optional(".input_scale", FLOATS))
    parts.optional(".input_zero_point", (INT8,))
    rows, groups = -(-shape[0] // scheme.block_rows), scheme.group_count(shape[1])
    zero_points = None
    if packed and not scheme.symmetric:
        words = -(-rows * scheme.bits // WORD_BITS)
        zero_points = parts.required(".weight_zero_point", (INT32,), (words, groups))
    elif not scheme.symmetric:
        zero_points = parts.optional(".weight_zero_point", (INT8,), (rows, groups))
    g_idx = parts.optional(".weight_g_idx", (INT32,), (shape[1],))
    tensor = CompressedTensor(StoredWeight(codes, scales, zero_points, g_idx), scheme, shape)
    return QuantizedWeight(f"{parts.module}.weight", tensor, parts.taken)


def _packed_codes(parts: _ModuleParts, declared: WeightScheme) -> tuple[LazyTensor, tuple[int, ...]]:
    """The words of packed codes, and the shape of the weight."""
    words = parts.required(".weight_packed", (INT32,))
    shape = tuple(int(size) for size in parts.required(".weight_shape", (INT64, INT32), (2,)).load())
    expected = (shape[0], compressed.word_count(shape[1], declared.bits))
    if declared.kind != "int" or min(shape) <= 0 or words.shape != expected:
        raise InputRefused(
            "packing.part-shape",
            f"{words.origin}: words of shape {words.shape} do not hold {declared.bits}-bit codes of a weight {shape}",
            hint=HINT,
        )
    return words, shape


def _plain_codes(parts: _ModuleParts, declared: WeightScheme) -> tuple[LazyTensor, tuple[int, ...]]:
    """The codes, one in an element, and the shape of the weight."""
    codes = parts.required(".weight", (FP8 if declared.kind == "float" else INT8,))
    return codes, codes.shape


def _check_input_scale(scale: LazyTensor | None) -> None:
    """A static scheme that was saved without calibration has uninitialized memory as its scales."""
    if scale is None:
        return
    values = to_float32(scale.load())
    if not (np.isfinite(values) & (values > 1e-12)).all():
        raise InputRefused(
            "compressed.uncalibrated",
            f"{scale.origin}: is {quoted(values.reshape(-1)[:1].tolist())}: the activations were never calibrated",
            hint="quantize again with calibration data, or with dynamic activations (fp8-dynamic)",
        )


@dataclass(frozen=True)
class StoredWeight:
    """The stored tensors of a weight; ``g_idx``: the group of each column, if act-order permutes the groups."""

    codes: LazyTensor
    scales: LazyTensor
    zero_points: LazyTensor | None
    g_idx: LazyTensor | None


class CompressedTensor(LazyTensor):
    """A weight (O, I) in the type of its scales, as the library decompresses it."""

    def __init__(self, weight: StoredWeight, scheme: Scheme, shape: tuple[int, ...]) -> None:
        self.weight, self.scheme = weight, scheme
        self.shape, self.dtype, self.origin = shape, weight.scales.dtype, weight.codes.origin
        self.group_size = scheme.group_size if scheme.block_rows == 1 and weight.g_idx is None else None
        self.stored = _stored_name(scheme)

    def load_rows(self, first: int, last: int) -> Array:
        height = self.scheme.block_rows
        begin = first - first % height
        codes = self.weight.codes.load_rows(begin, last)
        if self.scheme.packed:
            codes = compressed.unpack(codes, self.scheme.bits, self.shape[1])
        scales = self._scale_rows(begin // height, -(-last // height))
        zero_points = self._zero_point_rows(begin // height, -(-last // height))
        if self.weight.g_idx is not None:
            return self._permuted_groups(self.weight.g_idx, codes, scales, zero_points)
        return compressed.dequantize(codes, scales, zero_points, self.scheme)[first - begin :]

    def _permuted_groups(self, stored: LazyTensor, codes: Array, scales: Array, zero_points: Array | None) -> Array:
        """Act-order: column i belongs to group g_idx[i], so every column gets a scale of its own."""
        g_idx = stored.load()
        if g_idx.min() < 0 or g_idx.max() >= scales.shape[1]:
            raise InputRefused(
                "compressed.order",
                f"{stored.origin}: refers to a group that does not exist (there are {scales.shape[1]})",
                hint=HINT,
            )
        by_column = replace(self.scheme, group_size=1, block_rows=1)
        zero_points = None if zero_points is None else zero_points[:, g_idx]
        return compressed.dequantize(codes, scales[:, g_idx], zero_points, by_column)

    def _scale_rows(self, first: int, last: int) -> Array:
        scales = self.weight.scales
        if scales.size == 1:
            return np.repeat(scales.load().reshape(1, 1), last - first, axis=0)
        return scales.load_rows(first, last).reshape(last - first, scales.row_size)

    def _zero_point_rows(self, first: int, last: int) -> Array | None:
        zero_points = self.weight.zero_points
        if zero_points is None or not self.scheme.packed:
            return None if zero_points is None else zero_points.load_rows(first, last)
        per_word = WORD_BITS // self.scheme.bits
        begin = first // per_word
        words = zero_points.load_rows(begin, -(-last // per_word))
        unpacked = compressed.unpack(np.ascontiguousarray(words.T), self.scheme.bits).T
        return unpacked[first - begin * per_word : last - begin * per_word]


def _stored_name(scheme: Scheme) -> str:
    """The type whose scheme this is, except for the group size and for how its codes are packed; "compressed-tensors"
    for other schemes.
    """
    alike = {name: replace(known, group_size=scheme.group_size) for name, known in SCHEMES.items()}
    same = [name for name, known in alike.items() if known == scheme]
    same += [name for name, known in alike.items() if replace(known, packed=scheme.packed) == scheme]
    return next(iter(same), "compressed-tensors")
