"""AWQ checkpoints in the "gemm" layout (AutoAWQ, GPTQModel): P.qweight, P.qzeros, P.scales, transposed against the weight."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.packings.parts import (
    FLOATS,
    HINT,
    check_groups,
    group_count,
    linear_weight,
    part,
    plain,
    skip_list,
    whole,
)
from gemma2tool.formats.packings.settings import Settings
from gemma2tool.model.lazy import FLOAT32, LazyTensor
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers import awq
from gemma2tool.quantizers.base import Encoder
from gemma2tool.storage.quoting import quoted

METHOD = "awq"
TYPES = ("awq-4",)
GROUP_SIZE = 128

CODES = ".qweight"
INT32 = np.dtype(np.int32)


def quantization_config(settings: Settings, modules: Mapping[str, bool], dtype: str) -> dict[str, object]:
    return {
        "bits": awq.BITS,
        "group_size": settings.groups(GROUP_SIZE),
        "modules_to_not_convert": skip_list(modules),
        "quant_method": METHOD,
        "version": "gemm",
        "zero_point": True,
    }


def encoder_for(spec: TensorSpec, settings: Settings, source: LazyTensor) -> Encoder | None:
    if not linear_weight(spec):
        return None
    check_groups(spec, settings.groups(GROUP_SIZE))
    if spec.shape[0] % awq.PER_WORD:
        raise UsageError("quantize.shape", f"{spec.name}: {spec.shape[0]} rows are not a multiple of {awq.PER_WORD}")
    return awq.Awq(settings.groups(GROUP_SIZE))


def unpack(raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object]) -> dict[str, LazyTensor]:
    bits, version = quantization_config.get("bits"), quantization_config.get("version", "gemm")
    if bits != awq.BITS or not isinstance(version, str) or version.lower() != "gemm":
        raise InputRefused(
            "awq.config",
            f"config.json: {quoted(bits)} bits in the layout {quoted(version)}",
            hint='4 bits in the layout "gemm" are supported',
        )
    quantized: dict[str, LazyTensor] = {}
    taken: set[str] = set()
    for name in raw:
        if not name.endswith(CODES):
            continue
        module = name.removesuffix(CODES)
        words = part(raw, name, (INT32,), None)
        if len(words.shape) != 2:
            raise InputRefused("packing.part-shape", f"{words.origin}: has the shape {words.shape}", hint=HINT)
        columns, rows = words.rows, words.shape[1] * awq.PER_WORD
        scales = part(raw, module + ".scales", FLOATS, (group_count(quantization_config, columns), rows))
        zeros = part(raw, module + ".qzeros", (INT32,), (scales.rows, words.shape[1]))
        quantized[module + ".weight"] = AwqTensor(words, zeros, scales)
        taken |= {name, module + ".scales", module + ".qzeros"}
    return {**plain(raw, taken, "AWQ"), **quantized}


class AwqTensor(LazyTensor):
    """A weight (O, I), float32. Its rows are columns of what is stored, so the packed codes are read whole and kept for a while."""

    def __init__(self, words: LazyTensor, zeros: LazyTensor, scales: LazyTensor) -> None:
        self.words, self.zeros, self.scales = words, zeros, scales
        self.shape, self.dtype = (scales.shape[1], words.rows), FLOAT32
        self.stored, self.origin, self.group_size = "awq-4", words.origin, words.rows // scales.rows

    def load_rows(self, first: int, last: int) -> np.ndarray:
        begin, end = first // awq.PER_WORD, -(-last // awq.PER_WORD)
        within = slice(first - begin * awq.PER_WORD, last - begin * awq.PER_WORD)
        codes = awq.unpack(whole(self.words)[:, begin:end].T)[within]
        zeros = awq.unpack(self.zeros.load()[:, begin:end].T)[within]
        scales = self.scales.load()[:, first:last].T
        return awq.dequantize(codes, zeros, scales, self.shape[1] // self.scales.rows)
