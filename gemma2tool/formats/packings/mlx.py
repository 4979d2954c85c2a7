"""MLX's affine quantization, as mlx-lm saves it: P.weight (uint32 words), P.scales, P.biases. The tied embedding is quantized too.

Its config names no method: ``quantization`` and ``quantization_config`` hold group_size, bits and mode, and for mixed models an
entry for each module that differs. Checked against mlx-lm 0.32.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.formats.packings.parts import FLOATS, HINT, part, plain
from gemma2tool.formats.packings.settings import Settings
from gemma2tool.model.lazy import FLOAT32, LazyTensor
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers import mlx
from gemma2tool.quantizers.base import Encoder
from gemma2tool.storage.quoting import quoted

METHOD = "mlx"
TYPES = ("mlx-4", "mlx-8")

UINT32 = np.dtype(np.uint32)


def quantization_config(settings: Settings, modules: Mapping[str, bool], dtype: str) -> dict[str, object]:
    """Written twice into config.json, as ``quantization`` and as ``quantization_config``.

    Which modules are quantized, mlx-lm sees from their scales.
    """
    return {"group_size": settings.groups(mlx.GROUP_SIZE), "bits": _bits(settings.type), "mode": "affine"}


def encoder_for(spec: TensorSpec, settings: Settings, source: LazyTensor) -> Encoder | None:
    """As mlx-lm chooses: a matrix whose columns do not divide into groups stays as it is."""
    group_size = settings.groups(mlx.GROUP_SIZE)
    if not spec.quantizable or spec.shape[1] % group_size:
        return None
    return mlx.Affine(_bits(settings.type), source.dtype if source.dtype in FLOATS else FLOAT32, group_size)


def _bits(type_name: str) -> int:
    return int(type_name.removeprefix("mlx-"))


def recognizes(quantization_config: Mapping[str, object]) -> bool:
    """Whether this is the quantization_config of mlx-lm."""
    return "quant_method" not in quantization_config and {"group_size", "bits"} <= set(quantization_config)


def unpack(raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object]) -> dict[str, LazyTensor]:
    quantized: dict[str, LazyTensor] = {}
    taken: set[str] = set()
    for name in raw:
        if not name.endswith(".scales"):
            continue
        module = name.removesuffix(".scales")
        own = quantization_config.get(module)
        settings = own if isinstance(own, dict) else quantization_config
        bits, group_size = settings.get("bits"), settings.get("group_size")
        if (
            settings.get("mode", "affine") != "affine"
            or type(bits) is not int
            or bits not in (4, 8)
            or type(group_size) is not int
            or group_size < 1
        ):
            raise InputRefused(
                "mlx.config",
                f"config.json: {quoted(module)} has {quoted(bits)} bits in groups of {quoted(group_size)}, "
                f"mode {quoted(settings.get('mode'))}",
                hint="affine quantization with 4 or 8 bits is supported",
            )
        words = part(raw, module + ".weight", (UINT32,), None)
        scales = part(raw, name, FLOATS, None)
        biases = part(raw, module + ".biases", (scales.dtype,), scales.shape)
        if len(words.shape) != 2 or scales.shape != (words.rows, words.row_size * 32 // bits // group_size):
            raise InputRefused(
                "packing.part-shape",
                f"{words.origin}: {words.shape} words with {scales.shape} scales, {bits} bits",
                hint=HINT,
            )
        quantized[module + ".weight"] = AffineTensor(words, scales, biases, bits)
        taken |= {name, module + ".weight", module + ".biases"}
    return {**plain(raw, taken, "MLX"), **quantized}


class AffineTensor(LazyTensor):
    """A weight (O, I) in the type of its scales."""

    def __init__(self, words: LazyTensor, scales: LazyTensor, biases: LazyTensor, bits: int) -> None:
        self.words, self.scales, self.biases, self.bits = words, scales, biases, bits
        self.shape, self.dtype = (words.rows, words.row_size * 32 // bits), scales.dtype
        self.stored, self.origin, self.group_size = f"mlx-{bits}", words.origin, self.shape[1] // scales.shape[1]

    def load_rows(self, first: int, last: int) -> np.ndarray:
        codes = mlx.unpack(self.words.load_rows(first, last), self.bits)
        return mlx.dequantize(codes, self.scales.load_rows(first, last), self.biases.load_rows(first, last))
