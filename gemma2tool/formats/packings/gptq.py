"""GPTQ checkpoints (AutoGPTQ, GPTQModel, AutoRound): P.qweight, P.qzeros, P.scales and P.g_idx, all transposed against the weight.

Two conventions for stored zero points exist, and a label (``checkpoint_format``) that many tools get wrong; where the zero points
themselves tell, as they do for every symmetric checkpoint, the label is checked. Checked against GPTQModel 7.6.
"""

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
    no_double_quant,
    part,
    plain,
    whole,
)
from gemma2tool.model.lazy import FLOAT32, LazyTensor
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers import gptq
from gemma2tool.quantizers.base import Encoder
from gemma2tool.quantizers.bitpack import WORD_BITS, unpack_words
from gemma2tool.storage.quoting import quoted

METHOD = "gptq"
TYPES = ("gptq-4", "gptq-8")
GROUP_SIZE = 128

CODES = ".qweight"
INT32 = np.dtype(np.int32)


def quantization_config(type_name: str, *, double_quant: bool, compute_dtype: str = "bfloat16") -> dict[str, object]:
    """vLLM's fast kernels ask for bits, group_size, sym and desc_act; GPTQModel for the rest."""
    no_double_quant(type_name, double_quant)
    return {
        "bits": _bits(type_name),
        "checkpoint_format": "gptq",
        "desc_act": False,
        "format": "gptq",
        "group_size": GROUP_SIZE,
        "lm_head": False,
        "method": "gptq",
        "pack_dtype": "int32",
        "quant_method": METHOD,
        "sym": True,
    }


def encoder_for(spec: TensorSpec, type_name: str, *, double_quant: bool, source: LazyTensor) -> Encoder | None:
    no_double_quant(type_name, double_quant)
    if not linear_weight(spec):
        return None
    check_groups(spec, GROUP_SIZE)
    per_word = WORD_BITS // _bits(type_name)
    if spec.shape[0] % per_word:
        raise UsageError("quantize.shape", f"{spec.name}: {spec.shape[0]} rows are not a multiple of {per_word}")
    return gptq.Gptq(_bits(type_name), GROUP_SIZE)


def _bits(type_name: str) -> int:
    return int(type_name.removeprefix("gptq-"))


def unpack(raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object]) -> dict[str, LazyTensor]:
    bits = quantization_config.get("bits")
    label = quantization_config.get("checkpoint_format", "gptq")
    if bits not in (4, 8) or label not in gptq.CHECKPOINT_FORMATS:
        raise InputRefused(
            "gptq.config",
            f"config.json: {quoted(bits)} bits in the checkpoint_format {quoted(label)}",
            hint=f"4 and 8 bits in {' and '.join(gptq.CHECKPOINT_FORMATS)} are supported",
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
        columns, rows = words.shape[0] * WORD_BITS // bits, words.shape[1]
        scales = part(raw, module + ".scales", FLOATS, (group_count(quantization_config, columns), rows))
        zeros = part(raw, module + ".qzeros", (INT32,), (scales.shape[0], rows * bits // WORD_BITS))
        _check_label(zeros, bits, label)
        quantized[module + ".weight"] = GptqTensor(
            words, zeros, scales, _groups(raw, module, columns, scales), bits, label
        )
        taken |= {name, module + ".scales", module + ".qzeros", module + ".g_idx"}
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


def _check_label(zeros: LazyTensor, bits: int, label: str) -> None:
    middle = 2 ** (bits - 1)
    stored = np.unique(unpack_words(zeros.load(), bits))
    actual = {middle - 1: "gptq", middle: "gptq_v2"}.get(int(stored[0])) if len(stored) == 1 else None
    if actual not in (None, label):
        raise InputRefused(
            "gptq.mislabelled",
            f"{zeros.origin}: zero points are stored as {actual} does, but the config says {label}",
            hint=f'libraries load this without an error and compute nonsense: set checkpoint_format to "{actual}" in config.json',
        )


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

    def load_rows(self, first: int, last: int) -> np.ndarray:
        codes = unpack_words(np.ascontiguousarray(whole(self.words)[:, first:last].T), self.bits)
        zeros = gptq.unpack_zeros(self.zeros.load(), self.bits, self.checkpoint_format)[:, first:last].T
        return gptq.dequantize(codes, zeros, self.scales.load()[:, first:last].T, self.groups)
