"""GPTQ checkpoints (AutoGPTQ, GPTQModel, AutoRound): P.qweight, P.qzeros, P.scales and P.g_idx, all transposed against the weight.

Two conventions for stored zero points exist, and a label (``checkpoint_format``) that many tools get wrong: ``gptq_labels`` holds it
against the content. Checked against GPTQModel 7.6.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.packings import gptq_labels
from gemma2tool.formats.packings.parts import (
    FLOATS,
    HINT,
    check_groups,
    group_count,
    linear_weight,
    part,
    plain,
    whole,
)
from gemma2tool.formats.packings.settings import Settings
from gemma2tool.model.lazy import FLOAT32, LazyTensor
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers import gptq
from gemma2tool.quantizers.base import Encoder
from gemma2tool.quantizers.bitpack import WORD_BITS, transposed, unpack_words
from gemma2tool.storage.quoting import quoted

METHOD = "gptq"
TYPES = ("gptq-4", "gptq-8")
GROUP_SIZE = 128
CONFIG_FILE = "quantize_config.json"

CODES = ".qweight"
INT32 = np.dtype(np.int32)


def quantization_config(settings: Settings, modules: Mapping[str, bool], dtype: str) -> dict[str, object]:
    """vLLM's fast kernels ask for bits, group_size, sym and desc_act; GPTQModel for the rest.

    Layers that are not quantized are told twice: ``dynamic`` to GPTQModel and vLLM, ``modules_in_block_to_quantize``, which lists the
    others, to transformers.
    """
    checkpoint_format = settings.checkpoint_format or "gptq"
    config: dict[str, object] = {
        "bits": _bits(settings.type),
        "checkpoint_format": checkpoint_format,
        "desc_act": settings.act_order,
        "format": checkpoint_format,
        "group_size": settings.groups(GROUP_SIZE),
        "lm_head": False,
        "method": "gptq",
        "pack_dtype": "int32",
        "quant_method": METHOD,
        "sym": settings.symmetric is not False,
    }
    kept = [name for name, quantized in modules.items() if not quantized]
    if kept:
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in kept}
        config["modules_in_block_to_quantize"] = [[name for name, quantized in modules.items() if quantized]]
    return config


def encoder_for(spec: TensorSpec, settings: Settings, source: LazyTensor) -> Encoder | None:
    if not linear_weight(spec):
        return None
    bits, group_size = _bits(settings.type), settings.groups(GROUP_SIZE)
    check_groups(spec, group_size)
    per_word = WORD_BITS // bits
    for size, what in zip(spec.shape, ("rows", "columns"), strict=True):
        if size % per_word:
            raise UsageError("quantize.shape", f"{spec.name}: {size} {what} are not a multiple of {per_word}")
    return gptq.Gptq(bits, group_size, settings.symmetric is not False, settings.checkpoint_format or "gptq")


def _bits(type_name: str) -> int:
    return int(type_name.removeprefix("gptq-"))


def unpack(raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object]) -> dict[str, LazyTensor]:
    bits = quantization_config.get("bits")
    label = quantization_config.get("checkpoint_format", "gptq")
    if type(bits) is not int or bits not in (4, 8) or label not in gptq.CHECKPOINT_FORMATS:
        raise InputRefused(
            "gptq.config",
            f"config.json: {quoted(bits)} bits in the checkpoint_format {quoted(label)}",
            hint=f"4 and 8 bits in {' and '.join(gptq.CHECKPOINT_FORMATS)} are supported",
        )
    quantized: dict[str, GptqTensor] = {}
    taken: set[str] = set()
    for name in raw:
        if not name.endswith(CODES):
            continue
        module = name.removesuffix(CODES)
        words = part(raw, name, (INT32,), None)
        if len(words.shape) != 2:
            raise InputRefused("packing.part-shape", f"{words.origin}: has the shape {words.shape}", hint=HINT)
        columns, rows = words.shape[0] * WORD_BITS // bits, words.shape[1]
        scales = part(raw, module + ".scales", FLOATS, (group_count(quantization_config, columns), rows))
        zeros = part(raw, module + ".qzeros", (INT32,), (scales.shape[0], rows * bits // WORD_BITS))
        groups = _groups(raw, module, columns, scales)
        quantized[module + ".weight"] = GptqTensor(words, zeros, scales, groups, bits, label)
        taken |= {name, module + ".scales", module + ".qzeros", module + ".g_idx"}
    gptq_labels.check(quantized, quantization_config)
    return {**plain(raw, taken, "GPTQ"), **quantized}


def _groups(raw: Mapping[str, LazyTensor], module: str, columns: int, scales: LazyTensor) -> np.ndarray:
    """The group of each column: stored (act-order permutes them), else one after the other."""
    if module + ".g_idx" not in raw:
        return np.arange(columns) // (columns // scales.rows)
    stored = part(raw, module + ".g_idx", (INT32,), (columns,))
    groups = stored.load()
    if groups.min() < 0 or groups.max() >= scales.rows:
        raise InputRefused("gptq.g-idx", f"{stored.origin}: names a group that does not exist", hint=HINT)
    return groups


class GptqTensor(LazyTensor):
    """A weight (O, I), float32. Its rows are columns of what is stored, so the packed codes are read whole and kept for a while."""

    def __init__(
        self,
        words: LazyTensor,
        zeros: LazyTensor,
        scales: LazyTensor,
        groups: np.ndarray,
        bits: int,
        checkpoint_format: str,
    ) -> None:
        self.words, self.zeros, self.scales, self.groups = words, zeros, scales, groups
        self.bits, self.checkpoint_format = bits, checkpoint_format
        self.shape, self.dtype = (words.shape[1], len(groups)), FLOAT32
        self.stored, self.origin = f"gptq-{bits}", words.origin
        width = len(groups) // scales.rows
        self.group_size = width if np.array_equal(groups, np.arange(len(groups)) // width) else None

    def load_rows(self, first: int, last: int) -> np.ndarray:
        codes = unpack_words(transposed(whole(self.words)[:, first:last]), self.bits)
        zeros = gptq.unpack_zeros(self.zeros.load(), self.bits, self.checkpoint_format)[:, first:last].T
        return gptq.dequantize(codes, zeros, self.scales.load()[:, first:last].T, self.groups)
