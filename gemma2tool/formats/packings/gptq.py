"""GPTQ checkpoints (AutoGPTQ, GPTQModel, AutoRound): P.qweight, P.qzeros and P.scales, see ``transposed``, and P.g_idx.

There are two conventions for stored zero points, and a label (``checkpoint_format``) that many tools set wrong:
``gptq_labels`` compares it with the content. Checked against GPTQModel 7.6.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.formats.packings import gptq_labels
from gemma2tool.formats.packings.base import Packing, QuantizedWeight
from gemma2tool.formats.packings.parts import (
    HINT,
    INT32,
    cached_array,
    check_group_size,
    check_multiple,
    is_linear_weight,
    required_part,
)
from gemma2tool.formats.packings.settings import Settings
from gemma2tool.formats.packings.transposed import GROUP_SIZE, TransposedParts, TransposedTensor, transposed_parts
from gemma2tool.model.lazy import Array, LazyTensor
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers import gptq
from gemma2tool.quantizers.base import Encoder
from gemma2tool.quantizers.bitpack import WORD_BITS, transposed, unpack_words
from gemma2tool.storage.quoting import quoted

CONFIG_FILE = "quantize_config.json"
BITS = {gptq.Gptq(bits).name: bits for bits in (4, 8)}
"""Type to the bits of its codes."""


class GptqPacking(Packing):
    method = "gptq"
    title = "GPTQ"
    types = tuple(BITS)

    def quantization_config(self, settings: Settings, modules: Mapping[str, bool], dtype: str) -> dict[str, object]:
        """vLLM's fast kernels read bits, group_size, sym and desc_act; GPTQModel reads the rest.

        Unquantized layers are listed twice: in ``dynamic`` for GPTQModel and vLLM, and for transformers by their
        absence from ``modules_in_block_to_quantize``.
        """
        config: dict[str, object] = {
            "bits": BITS[settings.type],
            "checkpoint_format": settings.gptq_format,
            "desc_act": settings.act_order,
            "format": settings.gptq_format,
            "group_size": settings.group_size_or(GROUP_SIZE),
            "lm_head": False,
            "method": "gptq",
            "pack_dtype": "int32",
            "quant_method": self.method,
            "sym": settings.symmetric,
        }
        unquantized = [name for name, is_quantized in modules.items() if not is_quantized]
        if unquantized:
            config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in unquantized}
        if any("layers." in name for name in unquantized):
            config["modules_in_block_to_quantize"] = [[name for name, is_quantized in modules.items() if is_quantized]]
        return config

    def more_files(self, settings: Settings, modules: Mapping[str, bool]) -> dict[str, object]:
        """GPTQ's libraries read this file before config.json."""
        return {CONFIG_FILE: self.quantization_config(settings, modules, "bfloat16")}

    def encoder_for(self, spec: TensorSpec, settings: Settings, source: LazyTensor) -> Encoder | None:
        if not is_linear_weight(spec):
            return None
        bits, group_size = BITS[settings.type], settings.group_size_or(GROUP_SIZE)
        check_group_size(spec, group_size)
        for axis in (0, 1):
            check_multiple(spec, axis, WORD_BITS // bits)
        return gptq.Gptq(bits, group_size, settings.symmetric, settings.gptq_format)

    def weights(
        self, raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object]
    ) -> Iterator[QuantizedWeight]:
        bits, label = quantization_config.get("bits"), quantization_config.get("checkpoint_format", "gptq")
        if (
            type(bits) is not int
            or bits not in BITS.values()
            or not isinstance(label, str)
            or label not in gptq.CHECKPOINT_FORMATS
        ):
            raise InputRefused(
                "gptq.config",
                f"config.json: {quoted(bits)} bits in the checkpoint_format {quoted(label)}",
                hint=f"4 and 8 bits in {' and '.join(gptq.CHECKPOINT_FORMATS)} are supported",
            )
        tensors: list[GptqTensor] = []
        weights: list[QuantizedWeight] = []
        for parts in transposed_parts(raw, quantization_config, bits, along_input=True):
            tensor = GptqTensor(parts, _column_groups(raw, parts), bits, label)
            tensors.append(tensor)
            weights.append(QuantizedWeight(f"{parts.module}.weight", tensor, parts.names | {f"{parts.module}.g_idx"}))
        gptq_labels.check(tensors, quantization_config)
        yield from weights


def _column_groups(raw: Mapping[str, LazyTensor], parts: TransposedParts) -> Array:
    """The group of each column, (I,): as stored in g_idx (act-order permutes them), otherwise in order."""
    columns, groups = parts.shape[1], parts.scales.rows
    if f"{parts.module}.g_idx" not in raw:
        return np.arange(columns) // (columns // groups)
    stored = required_part(raw, f"{parts.module}.g_idx", (INT32,), (columns,))
    g_idx = stored.load()
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise InputRefused(
            "gptq.g-idx", f"{stored.origin}: refers to a group that does not exist (there are {groups})", hint=HINT
        )
    return g_idx


class GptqTensor(TransposedTensor):
    """``g_idx``: the group of each column, (I,). ``group_size`` is None if act-order permutes the groups."""

    def __init__(self, parts: TransposedParts, g_idx: Array, bits: int, checkpoint_format: str) -> None:
        super().__init__(parts, gptq.Gptq(bits).name)
        self.g_idx, self.bits, self.checkpoint_format = g_idx, bits, checkpoint_format
        width = len(g_idx) // self.scales.rows
        self.group_size = width if np.array_equal(g_idx, np.arange(len(g_idx)) // width) else None

    def load_rows(self, first: int, last: int) -> Array:
        codes = unpack_words(transposed(cached_array(self.words)[:, first:last]), self.bits)
        zeros = gptq.unpack_zeros(self.zeros.load(), self.bits, self.checkpoint_format)[:, first:last].T
        return gptq.dequantize(codes, zeros, self.scales.load()[:, first:last].T, self.g_idx)
