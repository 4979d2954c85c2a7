"""bitsandbytes: nf4 and fp4, with or without double quantization, and LLM.int8(), as transformers saves them.

A 4-bit weight P.weight is stored as P.weight (codes), P.weight.absmax, P.weight.quant_map and
P.weight.quant_state.bitsandbytes__nf4 (JSON, see ``bnb_state``); doubly quantized, also as P.weight.nested_absmax and
P.weight.nested_quant_map. An 8-bit weight is stored as P.weight, P.SCB and P.weight_format. Checked against
transformers 5.23 with bitsandbytes 0.50.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.formats.packings import listed
from gemma2tool.formats.packings.base import Packing, QuantizedWeight
from gemma2tool.formats.packings.bnb_state import NestedState, QuantState, read_state
from gemma2tool.formats.packings.parts import (
    FLOATS,
    HINT,
    INT8,
    UINT8,
    is_linear_weight,
    modules_not_converted,
    quantized_dtype,
    required_matrix,
    required_part,
)
from gemma2tool.formats.packings.settings import Settings
from gemma2tool.model.lazy import BFLOAT16, FLOAT32, Array, DType, LazyTensor, to_float32
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers import bnb
from gemma2tool.quantizers.base import Encoder
from gemma2tool.quantizers.bnb_tables import CODES

STATE_PREFIX = ".quant_state.bitsandbytes__"
ROW_MAJOR = 0
"""The only ``weight_format`` that is not tiled for one GPU generation."""


class BitsAndBytesPacking(Packing):
    method = "bitsandbytes"
    title = "bitsandbytes"
    types = (*CODES, bnb.Int8.name)

    def quantization_config(self, settings: Settings, modules: Mapping[str, bool], dtype: str) -> dict[str, object]:
        """As transformers' BitsAndBytesConfig is saved. The fields that a type does not use keep the class's defaults.

        ``bnb_4bit_compute_dtype`` is the model's own although transformers' default is float32, which makes a bfloat16
        model slow and large.
        """
        four_bit = settings.type in CODES
        return {
            "_load_in_4bit": four_bit,
            "_load_in_8bit": not four_bit,
            "bnb_4bit_compute_dtype": dtype if four_bit else "float32",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": settings.type if four_bit else "fp4",
            "bnb_4bit_use_double_quant": settings.options.double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": modules_not_converted(modules),
            "llm_int8_threshold": 6.0,
            "load_in_4bit": four_bit,
            "load_in_8bit": not four_bit,
            "quant_method": self.method,
        }

    def misread(
        self, modules: Collection[str], default: Collection[str], quantization_config: Mapping[str, object]
    ) -> Collection[str]:
        skipped = quantization_config.get("llm_int8_skip_modules")
        skips = set(default) if skipped is None else listed.skipped(modules, skipped)
        return set(modules) - skips

    def encoder_for(self, spec: TensorSpec, settings: Settings, source: LazyTensor) -> Encoder | None:
        if not is_linear_weight(spec):
            return None
        if settings.type == bnb.Int8.name:
            return bnb.Int8()
        return bnb.FourBit(settings.type, settings.options.double_quant, quantized_dtype(source)).surveyed(source)

    def weights(
        self, raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object]
    ) -> Iterator[QuantizedWeight]:
        """The tensors themselves show which weights are quantized and how; the config is not needed."""
        described: set[str] = set()
        for name in raw:
            if STATE_PREFIX in name:
                weight = _four_bit(raw, name.partition(STATE_PREFIX)[0], name)
            elif name.endswith(".SCB"):
                weight = _int8(raw, name.removesuffix("SCB") + "weight", name)
            else:
                continue
            if weight.name in described:
                raise InputRefused(
                    "bnb.state", f"{raw[name].origin}: another tensor also describes its weight", hint=HINT
                )
            described.add(weight.name)
            yield weight


def _four_bit(raw: Mapping[str, LazyTensor], base: str, state_name: str) -> QuantizedWeight:
    state = read_state(raw[state_name], state_name.removeprefix(base + STATE_PREFIX))
    parts = {base, f"{base}.absmax", f"{base}.quant_map", state_name}
    count = math.prod(state.shape)
    codes = required_part(raw, base, (UINT8, *FLOATS), None)
    # Codes may be stored under a wider type (bnb_4bit_quant_storage), whose bytes they are.
    if codes.shape != (codes.rows, 1) or codes.nbytes != -(-count // 2):
        raise InputRefused(
            "packing.part-shape",
            f"{codes.origin}: {codes.dtype.name} of shape {codes.shape} does not hold the codes of a weight"
            f" {state.shape}",
            hint=HINT,
        )
    _check_map(required_part(raw, f"{base}.quant_map", (FLOAT32,), (16,)), CODES[state.quant_type])
    blocks = -(-count // state.blocksize)
    if state.nested is None:
        _refuse_saved_after_forward(raw, base, state)
        absmax = required_part(raw, f"{base}.absmax", (FLOAT32,), (blocks,))
        return QuantizedWeight(base, FourBitTensor(codes, absmax, state), parts)
    absmax = required_part(raw, f"{base}.absmax", (UINT8,), (blocks,))
    nested_blocks = -(-blocks // state.nested.blocksize)
    nested_absmax = required_part(raw, f"{base}.nested_absmax", (FLOAT32,), (nested_blocks,))
    numbers = required_part(raw, f"{base}.nested_quant_map", (FLOAT32,), (256,)).load()
    if not (np.abs(numbers) <= 1).all():
        raise InputRefused("bnb.quant-map", f"{base}.nested_quant_map: not 256 numbers from -1 to 1", hint=HINT)
    parts |= {f"{base}.nested_absmax", f"{base}.nested_quant_map"}
    tensor = FourBitTensor(codes, NestedAbsmax(absmax, nested_absmax, numbers, state.nested), state)
    return QuantizedWeight(base, tensor, parts)


def _check_map(quant_map: LazyTensor, expected: Array) -> None:
    """The library's kernels have the 16 numbers built in and ignore the file's, so another table would be an unnoticed
    fault.
    """
    if not (np.abs(quant_map.load() - expected) <= 1e-4).all():
        raise InputRefused(
            "bnb.quant-map", f"{quant_map.origin}: not the numbers of the type that quant_state names", hint=HINT
        )


def _refuse_saved_after_forward(raw: Mapping[str, LazyTensor], base: str, state: QuantState) -> None:
    """On CPUs with bfloat16 instructions the library rearranges absmax for its first forward pass, and saves it in that
    order.
    """
    absmax = raw.get(f"{base}.absmax")
    rows, columns = state.shape
    if absmax is not None and absmax.dtype == BFLOAT16 and absmax.shape == (columns // state.blocksize, rows):
        raise InputRefused(
            "bnb.saved-after-forward",
            f"{absmax.origin}: absmax is rounded to bfloat16 and transposed: the model was saved after a forward pass"
            " on CPU",
            hint="libraries load this without an error and compute wrong values: quantize again, and save before the"
            " first forward pass",
        )


def _int8(raw: Mapping[str, LazyTensor], base: str, scb_name: str) -> QuantizedWeight:
    codes = required_matrix(raw, base, (INT8,))
    scales = required_part(raw, scb_name, FLOATS, codes.shape[:1])
    format_name = f"{base}_format"
    if format_name in raw:
        weight_format = int(required_part(raw, format_name, (UINT8,), ()).load())
        if weight_format != ROW_MAJOR:
            raise InputRefused(
                "bnb.weight-format",
                f"{raw[format_name].origin}: is {weight_format}: rows are tiled for one GPU generation, not row-major"
                f" ({ROW_MAJOR})",
                hint="load the model with a current bitsandbytes and save it again",
            )
    return QuantizedWeight(base, Int8Tensor(codes, scales), {base, scb_name, format_name})


class FourBitTensor(LazyTensor):
    """A 4-bit weight (O, I), with the values that bitsandbytes computes with.

    They are of the type that quant_state names: number * absmax in float32, rounded to it. ``dtype=np.float32`` gives
    them unrounded. (bitsandbytes 0.50 itself, on CPUs with AVX-512, uses wrong absmax values if I is a multiple of 16
    but not of the block size.)
    """

    def __init__(
        self, codes: LazyTensor, absmax: LazyTensor | NestedAbsmax, state: QuantState, dtype: DType | None = None
    ) -> None:
        self.codes, self.absmax, self.state = codes, absmax, state
        self.shape, self.dtype, self.stored = state.shape, np.dtype(dtype or state.dtype), state.name
        self.origin = codes.origin

    def load_rows(self, first: int, last: int) -> Array:
        blocksize = self.state.blocksize
        start, stop = first * self.row_size, last * self.row_size
        first_block, last_block = start // blocksize, -(-stop // blocksize)
        width = self.codes.dtype.itemsize
        first_byte, last_byte = first_block * blocksize // 2, -(-min(last_block * blocksize, self.size) // 2)
        packed = self.codes.load_rows(first_byte // width, last_byte // width).reshape(-1).view(UINT8)
        absmax = self.absmax.load_rows(first_block, last_block)
        skipped = first_block * blocksize
        values = bnb.dequantize_4bit(packed, absmax, self.state.quant_type, stop - skipped, self.dtype, blocksize)
        return values[start - skipped :].reshape(last - first, *self.shape[1:])


class NestedAbsmax:
    """The absmax values of a doubly quantized weight: numbers[code] * nested absmax + offset, float32 (blocks,)."""

    def __init__(self, codes: LazyTensor, absmax: LazyTensor, numbers: Array, state: NestedState) -> None:
        self.codes, self.absmax, self.numbers, self.state = codes, absmax, numbers, state

    def load_rows(self, first: int, last: int) -> Array:
        blocksize = self.state.blocksize
        first_block, last_block = first // blocksize, -(-last // blocksize)
        absmax = self.absmax.load_rows(first_block, last_block)
        codes = self.codes.load_rows(first_block * blocksize, last)
        values = bnb.dequantize_8bit(codes, absmax, self.numbers, blocksize) + self.state.offset
        return values[first - first_block * blocksize :]


class Int8Tensor(LazyTensor):
    """An LLM.int8() weight (O, I) as float32: code * SCB / 127."""

    def __init__(self, codes: LazyTensor, scales: LazyTensor) -> None:
        self.codes, self.scales = codes, scales
        self.shape, self.dtype, self.stored, self.origin = codes.shape, FLOAT32, bnb.Int8.name, codes.origin

    def load_rows(self, first: int, last: int) -> Array:
        return bnb.dequantize_int8(self.codes.load_rows(first, last), to_float32(self.scales.load_rows(first, last)))
