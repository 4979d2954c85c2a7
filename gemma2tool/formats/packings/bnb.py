"""bitsandbytes: nf4 and fp4, with or without double quantization, and LLM.int8(), as transformers saves them.

A 4-bit weight P.weight is stored as P.weight (codes), P.weight.absmax, P.weight.quant_map, P.weight.quant_state.bitsandbytes__nf4
(JSON) and, doubly quantized, P.weight.nested_absmax and P.weight.nested_quant_map; an 8-bit one as P.weight, P.SCB and
P.weight_format. Checked against transformers 5.23 with bitsandbytes 0.50.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused
from gemma2tool.formats.packings.parts import FLOATS, HINT, linear_weight, part, plain, skip_list
from gemma2tool.formats.packings.settings import Settings
from gemma2tool.model.lazy import BFLOAT16, FLOAT32, LazyTensor, to_float32
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers import bnb
from gemma2tool.quantizers.base import Encoder
from gemma2tool.quantizers.bnb_tables import CODES
from gemma2tool.storage.quoting import quoted

METHOD = "bitsandbytes"
TYPES = ("nf4", "fp4", "int8")

UINT8 = np.dtype(np.uint8)
INT8 = np.dtype(np.int8)
STATE_PREFIX = ".quant_state.bitsandbytes__"
MAX_STATE_BYTES = 4096


def quantization_config(settings: Settings, modules: Mapping[str, bool], dtype: str) -> dict[str, object]:
    """As transformers' BitsAndBytesConfig is saved. The fields that a type does not use keep the class's defaults.

    ``bnb_4bit_compute_dtype`` is the model's own although transformers' default is float32: that makes a bfloat16 model slow and large.
    """
    four_bit = settings.type != "int8"
    return {
        "_load_in_4bit": four_bit,
        "_load_in_8bit": not four_bit,
        "bnb_4bit_compute_dtype": dtype if four_bit else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": settings.type if four_bit else "fp4",
        "bnb_4bit_use_double_quant": settings.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skip_list(modules),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four_bit,
        "load_in_8bit": not four_bit,
        "quant_method": METHOD,
    }


def encoder_for(spec: TensorSpec, settings: Settings, source: LazyTensor) -> Encoder | None:
    """The library quantizes every linear layer but the output head, and never the embedding."""
    if not linear_weight(spec):
        return None
    if settings.type == "int8":
        return bnb.Int8()
    dtype = source.dtype if source.dtype in bnb.QUANT_DTYPES.values() else FLOAT32
    return bnb.FourBit(settings.type, settings.double_quant, dtype).surveyed(source)


def unpack(raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object]) -> dict[str, LazyTensor]:
    """See ``packings.unpack``. The files say themselves which weights are quantized and how; the config is not needed."""
    quantized: dict[str, LazyTensor] = {}
    taken: set[str] = set()
    for name in raw:
        if STATE_PREFIX in name:
            base = name.partition(STATE_PREFIX)[0]
            tensor, parts = _four_bit(raw, base, name)
        elif name.endswith(".SCB"):
            base = name.removesuffix("SCB") + "weight"
            tensor, parts = _int8(raw, base, name)
        else:
            continue
        if base in quantized:
            raise InputRefused("bnb.state", f"{raw[name].origin}: says again how its weight is quantized", hint=HINT)
        quantized[base] = tensor
        taken |= parts
    return {**plain(raw, taken, "bitsandbytes"), **quantized}


@dataclass(frozen=True)
class QuantState:
    """What the JSON beside a 4-bit weight says, checked."""

    quant_type: str
    blocksize: int
    dtype: np.dtype
    shape: tuple[int, ...]
    nested_blocksize: int | None = None
    nested_offset: np.float32 | None = None

    @property
    def name(self) -> str:
        return self.quant_type + ("-dq" if self.nested_blocksize else "")


def read_state(tensor: LazyTensor, quant_type: str) -> QuantState:
    """Parse and check the JSON; ``quant_type`` is the one that the tensor's name gives. Raises InputRefused."""
    if tensor.dtype != UINT8 or len(tensor.shape) != 1 or tensor.size > MAX_STATE_BYTES:
        raise InputRefused(
            "bnb.state", f"{tensor.origin}: {tensor.shape} {tensor.dtype.name} is not a quant_state", hint=HINT
        )
    content = strict_json.load(tensor.load().tobytes(), what=tensor.origin, max_bytes=MAX_STATE_BYTES)

    def check(ok: bool, complaint: str) -> None:
        if not ok:
            raise InputRefused("bnb.state", f"{tensor.origin}: {complaint}", hint=HINT)

    check(isinstance(content, dict), "not a JSON object")
    keys = {"quant_type", "blocksize", "dtype", "shape"}
    nested = {"nested_blocksize", "nested_dtype", "nested_offset"}
    check(set(content) in (keys, keys | nested), f"its keys are {quoted(sorted(content))}")
    check(content["quant_type"] == quant_type and quant_type in CODES, f"its type is {quoted(content['quant_type'])}")
    check(_is_blocksize(content["blocksize"]), f"its blocksize is {quoted(content['blocksize'])}")
    check(
        isinstance(content["dtype"], str) and content["dtype"] in bnb.QUANT_DTYPES,
        f"its dtype is {quoted(content['dtype'])}",
    )
    shape = content["shape"]
    check(
        isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in shape),
        f"its shape is {quoted(shape)}",
    )
    state = QuantState(quant_type, content["blocksize"], bnb.QUANT_DTYPES[content["dtype"]], tuple(shape))
    if nested.isdisjoint(content):
        return state
    check(_is_blocksize(content["nested_blocksize"]), f"its nested_blocksize is {quoted(content['nested_blocksize'])}")
    check(content["nested_dtype"] == "float32", f"its nested_dtype is {quoted(content['nested_dtype'])}")
    offset = content["nested_offset"]
    check(type(offset) in (int, float) and abs(offset) < 3e38, f"its nested_offset is {quoted(offset)}")
    return QuantState(
        state.quant_type, state.blocksize, state.dtype, state.shape, content["nested_blocksize"], np.float32(offset)
    )


def _is_blocksize(value: object) -> bool:
    return type(value) is int and value in bnb.BLOCKSIZES


def _four_bit(raw: Mapping[str, LazyTensor], base: str, state_name: str) -> tuple[LazyTensor, set[str]]:
    state = read_state(raw[state_name], state_name.removeprefix(base + STATE_PREFIX))
    parts = {base, base + ".absmax", base + ".quant_map", state_name}
    count = math.prod(state.shape)
    codes = part(raw, base, (UINT8, *FLOATS), None)
    # Codes may be stored under a wider type, whose bytes they are (bnb_4bit_quant_storage).
    if codes.shape != (codes.rows, 1) or codes.nbytes != -(-count // 2):
        raise InputRefused(
            "packing.part-shape",
            f"{codes.origin}: {codes.shape} {codes.dtype.name} does not hold the codes of a weight {state.shape}",
            hint=HINT,
        )
    _check_map(part(raw, base + ".quant_map", (FLOAT32,), (16,)), CODES[state.quant_type])
    blocks = -(-count // state.blocksize)
    if state.nested_blocksize is None:
        _refuse_saved_after_forward(raw, base, state)
        absmax = part(raw, base + ".absmax", (FLOAT32,), (blocks,))
        return FourBitTensor(codes, absmax, state), parts
    absmax = part(raw, base + ".absmax", (UINT8,), (blocks,))
    nested = part(raw, base + ".nested_absmax", (FLOAT32,), (-(-blocks // state.nested_blocksize),))
    numbers = part(raw, base + ".nested_quant_map", (FLOAT32,), (256,)).load()
    if not (np.abs(numbers) <= 1).all():
        raise InputRefused("bnb.quant-map", f"{base}.nested_quant_map: not 256 numbers from -1 to 1", hint=HINT)
    parts |= {base + ".nested_absmax", base + ".nested_quant_map"}
    return FourBitTensor(codes, NestedAbsmax(absmax, nested, numbers, state), state), parts


def _check_map(quant_map: LazyTensor, expected: np.ndarray) -> None:
    """The library's kernels have the 16 numbers built in and ignore the file's: another table would be a fault that nobody sees."""
    if not (np.abs(quant_map.load() - expected) <= 1e-4).all():
        raise InputRefused(
            "bnb.quant-map", f"{quant_map.origin}: not the numbers of the type that quant_state names", hint=HINT
        )


def _refuse_saved_after_forward(raw: Mapping[str, LazyTensor], base: str, state: QuantState) -> None:
    """On CPUs with bfloat16 instructions the library rearranges absmax for its first forward pass, and saves it like that."""
    absmax = raw.get(base + ".absmax")
    rows, columns = state.shape
    if absmax is not None and absmax.dtype == BFLOAT16 and absmax.shape == (columns // state.blocksize, rows):
        raise InputRefused(
            "bnb.saved-after-forward",
            f"{absmax.origin}: absmax is rounded to bfloat16 and transposed: the model was saved after a forward pass on CPU",
            hint="libraries load this without an error and compute nonsense: quantize again and save before the first forward pass",
        )


def _int8(raw: Mapping[str, LazyTensor], base: str, scb_name: str) -> tuple[LazyTensor, set[str]]:
    codes = part(raw, base, (INT8,), None)
    if len(codes.shape) != 2:
        raise InputRefused(
            "packing.part-shape", f"{codes.origin}: has the shape {codes.shape}, not that of a matrix", hint=HINT
        )
    scales = part(raw, scb_name, FLOATS, codes.shape[:1])
    format_name = base + "_format"
    if format_name in raw:
        order = part(raw, format_name, (UINT8,), ()).load()
        if order != 0:
            raise InputRefused(
                "bnb.weight-format",
                f"{raw[format_name].origin}: is {int(order)}: rows are tiled for one GPU generation, not row-major (0)",
                hint="load and save it again with a current bitsandbytes",
            )
    return Int8Tensor(codes, scales), {base, scb_name, format_name}


class FourBitTensor(LazyTensor):
    """A 4-bit weight (O, I), with the values that bitsandbytes computes with.

    They are of the type that quant_state names: number * absmax in float32, rounded to it. ``dtype=np.float32`` gives them unrounded.
    (bitsandbytes 0.50 itself, on CPUs with AVX-512, takes wrong absmax where I is a multiple of 16 but not of the block size.)
    """

    def __init__(
        self, codes: LazyTensor, absmax: LazyTensor | NestedAbsmax, state: QuantState, dtype: np.dtype | None = None
    ) -> None:
        self.codes, self.absmax, self.state = codes, absmax, state
        self.shape, self.dtype, self.stored = state.shape, np.dtype(dtype or state.dtype), state.name
        self.origin = codes.origin

    def load_rows(self, first: int, last: int) -> np.ndarray:
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

    def __init__(self, codes: LazyTensor, absmax: LazyTensor, numbers: np.ndarray, state: QuantState) -> None:
        self.codes, self.absmax, self.numbers, self.state = codes, absmax, numbers, state

    def load_rows(self, first: int, last: int) -> np.ndarray:
        blocksize = self.state.nested_blocksize
        first_block, last_block = first // blocksize, -(-last // blocksize)
        absmax = self.absmax.load_rows(first_block, last_block)
        codes = self.codes.load_rows(first_block * blocksize, last)
        values = bnb.dequantize_8bit(codes, absmax, self.numbers, blocksize) + self.state.nested_offset
        return values[first - first_block * blocksize :]


class Int8Tensor(LazyTensor):
    """An LLM.int8() weight (O, I) as float32: code * SCB / 127."""

    def __init__(self, codes: LazyTensor, scales: LazyTensor) -> None:
        self.codes, self.scales = codes, scales
        self.shape, self.dtype, self.stored, self.origin = codes.shape, FLOAT32, "int8", codes.origin

    def load_rows(self, first: int, last: int) -> np.ndarray:
        return bnb.dequantize_int8(self.codes.load_rows(first, last), to_float32(self.scales.load_rows(first, last)))
