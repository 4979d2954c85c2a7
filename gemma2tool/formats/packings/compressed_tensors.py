"""compressed-tensors: what llm-compressor writes and vLLM serves.

Depending on the scheme, P.weight (int8 or float8) or P.weight_packed with P.weight_shape, and P.weight_scale, P.weight_zero_point,
P.weight_g_idx (act-order), P.input_scale (static activations). Checked against compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.formats.packings.parts import FLOATS, HINT, check_groups, linear_weight, part, plain
from gemma2tool.formats.packings.settings import WHOLE_ROW, Settings
from gemma2tool.model.lazy import LazyTensor, to_float32
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers import compressed
from gemma2tool.quantizers.base import Encoder
from gemma2tool.quantizers.bitpack import WORD_BITS
from gemma2tool.quantizers.compressed import FP8, SCHEMES, Compressed, Scheme
from gemma2tool.storage.quoting import quoted

METHOD = "compressed-tensors"
TYPES = tuple(SCHEMES)
VERSION = "0.20.0"
PRESETS = {"w8a8-int8": "INT8"}
"""llm-compressor's names for the types, where they are not the type's own in capitals."""

SCALE = ".weight_scale"
INT8, INT32, INT64 = np.dtype(np.int8), np.dtype(np.int32), np.dtype(np.int64)


def quantization_config(settings: Settings, modules: Mapping[str, bool], dtype: str) -> dict[str, object]:
    """As llm-compressor writes it. Activations of the 8-bit types are quantized while the model runs."""
    type_name, scheme = settings.type, _scheme_of(settings)
    kind = "pack-quantized" if scheme.packed else f"{scheme.kind}-quantized"
    strategy = "block" if scheme.block_rows > 1 else "group" if scheme.group_size else "channel"
    weights: dict[str, object] = {
        "dynamic": False,
        "group_size": scheme.group_size if strategy == "group" else None,
        "num_bits": scheme.bits,
        "strategy": strategy,
        "symmetric": scheme.symmetric,
        "type": scheme.kind,
    }
    if strategy == "block":
        weights["block_structure"] = [scheme.block_rows, scheme.group_size]
    activations = None
    if not scheme.packed:
        activations = {
            "dynamic": True,
            "group_size": scheme.group_size,
            "num_bits": 8,
            "strategy": "group" if scheme.group_size else "token",
            "symmetric": True,
            "type": scheme.kind,
        }
    group = {
        "format": kind,
        "input_activations": activations,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {PRESETS.get(type_name, type_name.upper().replace("-", "_")): group},
        "format": kind,
        "global_compression_ratio": None,
        "ignore": ["lm_head", "model.embed_tokens", *(name for name, quantized in modules.items() if not quantized)],
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "transform_config": {},
        "version": VERSION,
    }


def encoder_for(spec: TensorSpec, settings: Settings, source: LazyTensor) -> Encoder | None:
    if not linear_weight(spec):
        return None
    scheme = _scheme_of(settings)
    if scheme.block_rows == 1 and scheme.group_size:
        check_groups(spec, scheme.group_size)
    dtype = source.dtype if source.dtype in FLOATS else np.dtype(np.float32)
    return Compressed(settings.type, dtype, None if scheme == SCHEMES[settings.type] else scheme)


def _scheme_of(settings: Settings) -> Scheme:
    if settings.group_size is None:
        return SCHEMES[settings.type]
    return replace(SCHEMES[settings.type], group_size=None if settings.group_size == WHOLE_ROW else settings.group_size)


def unpack(raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object]) -> dict[str, LazyTensor]:
    arguments = _weight_arguments(quantization_config)
    quantized: dict[str, LazyTensor] = {}
    taken: set[str] = set()
    for name in raw:
        if name.endswith(SCALE):
            module = name.removesuffix(SCALE)
            tensor, parts = _weight(raw, module, arguments)
            quantized[module + ".weight"] = tensor
            taken |= parts
    return {**plain(raw, taken, METHOD), **quantized}


def _weight_arguments(config: Mapping[str, object]) -> Mapping[str, object]:
    """The ``weights`` entry of the config's groups, which must agree."""
    groups = config.get("config_groups")
    found = (
        [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        if isinstance(groups, dict)
        else []
    )
    if not found or not all(isinstance(each, dict) and each == found[0] for each in found):
        raise InputRefused(
            "compressed.config",
            "config.json: quantization_config has no weights entry, or several that differ, in its config_groups",
            hint="one weight scheme for the whole model is supported",
        )
    weights = found[0]
    if (
        type(weights.get("num_bits")) is not int
        or weights["num_bits"] not in (4, 8)
        or weights.get("type") not in ("int", "float")
    ):
        raise InputRefused(
            "compressed.config",
            f"config.json: weights of {quoted(weights.get('num_bits'))} bits of type {quoted(weights.get('type'))}",
            hint="4 and 8 bit integers and 8 bit floats are supported",
        )
    return weights


def _weight(raw: Mapping[str, LazyTensor], module: str, weights: Mapping[str, object]) -> tuple[LazyTensor, set[str]]:
    parts = {module + SCALE}
    bits, kind = weights["num_bits"], weights["type"]
    packed = module + ".weight_packed" in raw

    def optional(suffix: str, dtypes: tuple[np.dtype, ...], shape: tuple[int, ...] | None) -> LazyTensor | None:
        if module + suffix not in raw:
            return None
        parts.add(module + suffix)
        return part(raw, module + suffix, dtypes, shape)

    if packed:
        codes = part(raw, module + ".weight_packed", (INT32,), None)
        shape = tuple(int(n) for n in part(raw, module + ".weight_shape", (INT64, INT32), (2,)).load())
        parts |= {module + ".weight_packed", module + ".weight_shape"}
        stored = (shape[0], shape[1] * bits // WORD_BITS)
        if kind != "int" or min(shape) <= 0 or shape[1] * bits % WORD_BITS or codes.shape != stored:
            raise InputRefused(
                "packing.part-shape",
                f"{codes.origin}: {codes.shape} words do not hold {bits}-bit codes of {shape}",
                hint=HINT,
            )
    else:
        codes = part(raw, module + ".weight", (FP8 if kind == "float" else INT8,), None)
        parts.add(module + ".weight")
        shape = codes.shape
    scales = part(raw, module + SCALE, FLOATS, None)
    scheme = _scheme(scales, shape, weights, packed)
    _check_input_scale(optional(".input_scale", FLOATS, None))
    optional(".input_zero_point", (INT8,), None)
    rows, groups = -(-shape[0] // scheme.block_rows), scheme.group_count(shape[1])
    zero_points = None
    if packed and not scheme.symmetric:
        zero_points = part(raw, module + ".weight_zero_point", (INT32,), (-(-rows * bits // WORD_BITS), groups))
        parts.add(module + ".weight_zero_point")
    elif not scheme.symmetric:
        zero_points = optional(".weight_zero_point", (INT8,), (rows, groups))
    order = optional(".weight_g_idx", (INT32,), (shape[1],))
    return CompressedTensor(codes, scales, zero_points, order, scheme, shape), parts


def _scheme(scales: LazyTensor, shape: tuple[int, ...], weights: Mapping[str, object], packed: bool) -> Scheme:
    """The scheme that the config names, checked against the shape of the scales."""
    strategy, group, block_rows = weights.get("strategy"), None, 1
    if strategy == "group":
        group = weights.get("group_size")
    elif strategy == "block":
        block = weights.get("block_structure")
        block_rows, group = block if isinstance(block, list) and len(block) == 2 else (0, 0)
    numbers = type(block_rows) is int and block_rows > 0 and (group is None or type(group) is int and group > 0)
    if len(shape) != 2 or not numbers or (block_rows == 1 and group and shape[1] % group):
        raise InputRefused(
            "compressed.config", f"{scales.origin}: no {quoted(strategy)} scheme for a weight {shape}", hint=HINT
        )
    scheme = Scheme(
        weights["num_bits"], weights["type"], group, block_rows, weights.get("symmetric") is not False, packed
    )
    expected = {(-(-shape[0] // block_rows), scheme.group_count(shape[1]))}
    if group is None:
        expected |= {(shape[0],), (1,), (), (1, 1)}  # by row, or one for the tensor
    if scales.shape not in expected:
        raise InputRefused(
            "packing.part-shape", f"{scales.origin}: {scales.shape} scales for a weight {shape}", hint=HINT
        )
    return scheme


def _check_input_scale(scale: LazyTensor | None) -> None:
    """A static scheme that was saved without calibration carries whatever was in memory."""
    if scale is None:
        return
    values = to_float32(scale.load())
    if not (np.isfinite(values) & (values > 1e-12)).all():
        raise InputRefused(
            "compressed.uncalibrated",
            f"{scale.origin}: is {quoted(values.reshape(-1)[:1].tolist())}: the activations were never calibrated",
            hint="quantize again with calibration data, or with dynamic activations (fp8-dynamic)",
        )


class CompressedTensor(LazyTensor):
    """A weight (O, I) in the type of its scales, as the library decompresses it."""

    def __init__(
        self,
        codes: LazyTensor,
        scales: LazyTensor,
        zero_points: LazyTensor | None,
        order: LazyTensor | None,
        scheme: Scheme,
        shape: tuple[int, ...],
    ) -> None:
        self.codes, self.scales, self.zero_points, self.order, self.scheme = codes, scales, zero_points, order, scheme
        self.shape, self.dtype, self.origin = shape, scales.dtype, codes.origin
        self.group_size = scheme.group_size if scheme.block_rows == 1 and order is None else None
        known = (name for name, each in SCHEMES.items() if each.bits == scheme.bits and each.kind == scheme.kind)
        same = (
            name
            for name in known
            if (SCHEMES[name].packed, SCHEMES[name].symmetric) == (scheme.packed, scheme.symmetric)
        )
        self.stored = next(
            (name for name in same if SCHEMES[name].block_rows == scheme.block_rows), "compressed-tensors"
        )

    def load_rows(self, first: int, last: int) -> np.ndarray:
        height = self.scheme.block_rows
        begin = first - first % height
        codes = self.codes.load_rows(begin, last)
        if self.scheme.packed:
            codes = compressed.unpack(codes, self.scheme.bits)
        scales = self._scale_rows(begin // height, -(-last // height))
        zero_points = self._zero_rows(begin // height, -(-last // height))
        if self.order is None:
            return compressed.dequantize(codes, scales, zero_points, self.scheme)[first - begin :]
        return self._by_order(codes, scales, zero_points)

    def _by_order(self, codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None) -> np.ndarray:
        """Act-order: column i belongs to group order[i]. Laid out by group, the columns are those of a plain weight."""
        order = self.order.load()
        if order.min() < 0 or order.max() >= scales.shape[1]:
            raise InputRefused("compressed.order", f"{self.order.origin}: names a group that does not exist", hint=HINT)
        by_column = Scheme(self.scheme.bits, self.scheme.kind, 1, 1, self.scheme.symmetric, self.scheme.packed)
        zeros = None if zero_points is None else zero_points[:, order]
        return compressed.dequantize(codes, scales[:, order], zeros, by_column)

    def _scale_rows(self, first: int, last: int) -> np.ndarray:
        if self.scales.size == 1:
            return np.repeat(self.scales.load().reshape(1, 1), last - first, axis=0)
        return self.scales.load_rows(first, last).reshape(last - first, self.scales.row_size)

    def _zero_rows(self, first: int, last: int) -> np.ndarray | None:
        if self.zero_points is None or not self.scheme.packed:
            return None if self.zero_points is None else self.zero_points.load_rows(first, last)
        per_word = WORD_BITS // self.scheme.bits
        begin = first // per_word
        words = self.zero_points.load_rows(begin, -(-last // per_word))
        zeros = compressed.unpack(np.ascontiguousarray(words.T), self.scheme.bits).T
        return zeros[first - begin * per_word : last - begin * per_word]
