"""AutoRound's own checkpoints: GPTQ's or AWQ's layout, under a config that names which (``packing_format``).

Layers may have bits and group sizes of their own (``extra_config``), which the shapes of their tensors show. What
AutoRound exports for other libraries (``auto_gptq``, ``auto_awq``, ``llm_compressor``) has those libraries' configs.
Checked against AutoRound 0.16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gemma2tool.errors import InputRefused
from gemma2tool.formats.packings.awq import AwqPacking
from gemma2tool.formats.packings.base import QuantizedWeight, ReadPacking
from gemma2tool.formats.packings.gptq import GptqPacking
from gemma2tool.formats.packings.transposed import CODES
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.quantizers.bitpack import WORD_BITS
from gemma2tool.storage.quoting import quoted

METHODS = ("auto-round", "auto_round", "intel/auto-round")
_GPTQ = ("auto_round:auto_gptq", "auto_round:gptq", "auto")
_PLAIN_ZEROS = ("auto_round", "auto_round:gptqmodel")
"""Formats that store zero points as they are; GPTQ's first convention stores them less one."""
_AWQ = ("auto_round:auto_awq", "auto_round:awq")


class AutoRoundPacking(ReadPacking):
    method = METHODS[0]
    title = "AutoRound"

    def recognizes(self, quantization_config: Mapping[str, object]) -> bool:
        return quantization_config.get("quant_method") in METHODS

    def weights(
        self, raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object]
    ) -> Iterator[QuantizedWeight]:
        packing_format = quantization_config.get("packing_format") or _GPTQ[0]
        if packing_format not in (*_GPTQ, *_AWQ, *_PLAIN_ZEROS):
            raise InputRefused("auto-round.format", f"config.json: packing_format is {quoted(packing_format)}")
        label = "gptq_v2" if packing_format in _PLAIN_ZEROS else "gptq"
        has_own = bool(quantization_config.get("extra_config"))
        for (bits, group_size), tensors in _by_settings(raw).items():
            config = {"bits": bits, "group_size": group_size}
            if packing_format in _AWQ:
                yield from AwqPacking().weights(tensors, config)
            else:
                symmetric = None if has_own else quantization_config.get("sym")
                yield from GptqPacking().weights(tensors, config | {"sym": symmetric, "checkpoint_format": label})


def _by_settings(raw: Mapping[str, LazyTensor]) -> dict[tuple[int, int], dict[str, LazyTensor]]:
    """The tensors of quantized modules, by bits and group size, which follow from their shapes."""
    result: dict[tuple[int, int], dict[str, LazyTensor]] = {}
    for name, words in raw.items():
        if not name.endswith(CODES):
            continue
        module = name.removesuffix(CODES)
        scales, zeros = raw.get(f"{module}.scales"), raw.get(f"{module}.qzeros")
        settings = _settings(words, scales, zeros)
        tensors = result.setdefault(settings, {})
        tensors |= {
            key: raw[key] for end in ("qweight", "qzeros", "scales", "g_idx") if (key := f"{module}.{end}") in raw
        }
    return result


def _settings(words: LazyTensor, scales: LazyTensor | None, zeros: LazyTensor | None) -> tuple[int, int]:
    """Bits and group size; 0, which nothing fits, where the shapes imply none."""
    is_whole = all(tensor is not None and len(tensor.shape) == 2 and tensor.size for tensor in (words, scales, zeros))
    if not is_whole or scales is None or zeros is None:
        return 4, 0
    bits = WORD_BITS * zeros.shape[1] // scales.shape[1]
    # Codes are packed along the input by GPTQ and along the output by AWQ, where the words are as wide as zero points.
    columns = words.shape[0] if words.shape[1] == zeros.shape[1] else words.shape[0] * WORD_BITS // max(bits, 1)
    return bits, columns // scales.shape[0]
