"""AWQ checkpoints in the "gemm" layout (AutoAWQ, GPTQModel): P.qweight, P.qzeros and P.scales, see ``transposed``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gemma2tool.errors import InputRefused
from gemma2tool.formats.packings.base import Packing, QuantizedWeight
from gemma2tool.formats.packings.parts import (
    cached_array,
    check_group_size,
    check_multiple,
    is_linear_weight,
    modules_not_converted,
)
from gemma2tool.formats.packings.settings import Settings
from gemma2tool.formats.packings.transposed import GROUP_SIZE, TransposedParts, TransposedTensor, transposed_parts
from gemma2tool.model.lazy import Array, LazyTensor
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers import awq
from gemma2tool.quantizers.base import Encoder
from gemma2tool.storage.quoting import quoted

LAYOUT = "gemm"


class AwqPacking(Packing):
    method = "awq"
    title = "AWQ"
    types = (awq.Awq.name,)

    def quantization_config(self, settings: Settings, modules: Mapping[str, bool], dtype: str) -> dict[str, object]:
        return {
            "bits": awq.BITS,
            "group_size": settings.group_size_or(GROUP_SIZE),
            "modules_to_not_convert": modules_not_converted(modules),
            "quant_method": self.method,
            "version": LAYOUT,
            "zero_point": True,
        }

    def encoder_for(self, spec: TensorSpec, settings: Settings, source: LazyTensor) -> Encoder | None:
        if not is_linear_weight(spec):
            return None
        group_size = settings.group_size_or(GROUP_SIZE)
        check_group_size(spec, group_size)
        check_multiple(spec, 0, awq.PER_WORD)
        return awq.Awq(group_size)

    def weights(
        self, raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object]
    ) -> Iterator[QuantizedWeight]:
        bits, layout = quantization_config.get("bits"), quantization_config.get("version", LAYOUT)
        if bits != awq.BITS or not isinstance(layout, str) or layout.lower() != LAYOUT:
            raise InputRefused(
                "awq.config",
                f"config.json: {quoted(bits)} bits in the layout {quoted(layout)}",
                hint=f'{awq.BITS} bits in the layout "{LAYOUT}" are supported',
            )
        for parts in transposed_parts(raw, quantization_config, awq.BITS, along_input=False):
            yield QuantizedWeight(f"{parts.module}.weight", AwqTensor(parts), parts.names)


class AwqTensor(TransposedTensor):
    def __init__(self, parts: TransposedParts) -> None:
        super().__init__(parts, awq.Awq.name)
        self.group_size = self.shape[1] // self.scales.rows

    def load_rows(self, first: int, last: int) -> Array:
        first_word, end_word = first // awq.PER_WORD, -(-last // awq.PER_WORD)
        rows = slice(first - first_word * awq.PER_WORD, last - first_word * awq.PER_WORD)
        codes = awq.unpack(cached_array(self.words)[:, first_word:end_word].T)[rows]
        zeros = awq.unpack(self.zeros.load()[:, first_word:end_word].T)[rows]
        scales = self.scales.load()[:, first:last].T
        return awq.dequantize(codes, zeros, scales, self.shape[1] // self.scales.rows)
