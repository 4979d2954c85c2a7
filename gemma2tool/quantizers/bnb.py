"""The types of bitsandbytes: nf4 and fp4 (with or without double quantization) and LLM.int8().

Every byte equals what bitsandbytes' CPU library writes (compared with 0.50). The 4-bit types split the flat, row-major
tensor into blocks of 64; a block stores its largest magnitude (*absmax*) and, for each value, the index of the nearest
of 16 numbers times absmax. Double quantization stores the absmax values in 8 bits, in blocks of 256, relative to their
mean. LLM.int8() scales each row of the float16-rounded matrix by 127 / absmax.

Dequantization is that of the library: absmax * number in float32, rounded to the dtype that the weight had when it was
quantized (see ``FourBit.dtype``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.model.lazy import BFLOAT16, FLOAT16, FLOAT32, Array, DType, LazyTensor, row_ranges, to_float32
from gemma2tool.quantizers.base import FLOAT16_LIMIT, Part
from gemma2tool.quantizers.bnb_tables import ASCENDING, CODES, MIDPOINTS, NESTED_BLOCKSIZE, dynamic_bins, dynamic_map
from gemma2tool.quantizers.bnb_tables import BLOCKSIZE as BLOCKSIZE
from gemma2tool.quantizers.casts import cast
from gemma2tool.quantizers.groups import kernel_floats
from gemma2tool.quantizers.kernels import _native

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The block sizes that the library accepts; its default is 64."""

QUANT_DTYPES = {"bfloat16": BFLOAT16, "float16": FLOAT16, "float32": FLOAT32}
"""The dtypes that a weight may have when it is quantized, by torch's name."""


def quantize_4bit(values: Array, quant_type: str) -> tuple[Array, Array]:
    """Quantize a flat array of floats; only the last block may be shorter than 64.

    Returns the codes, two in a byte with the first in the high half, uint8 ``(ceil(n / 2),)``, and absmax, float32
    ``(ceil(n / 64),)``. Like the library, it divides in a short last block and multiplies by the reciprocal in all
    others.
    """
    packed = np.empty(-(-len(values) // 2), np.uint8)
    return packed, _quantize_4bit(values, quant_type, packed)


def absmax_4bit(values: Array) -> Array:
    """The absmax values of ``quantize_4bit`` alone."""
    return _quantize_4bit(values, "nf4", None)


def _quantize_4bit(values: Array, quant_type: str, packed: Array | None) -> Array:
    values = kernel_floats(values)
    midpoints, ascending = MIDPOINTS[quant_type], ASCENDING[quant_type]
    absmax = np.empty(-(-values.size // BLOCKSIZE), np.float32)
    _native.bnb_quantize_4bit(
        midpoints.ctypes.data,
        ascending.ctypes.data,
        values.ctypes.data,
        values.dtype == BFLOAT16,
        values.size,
        0 if packed is None else packed.ctypes.data,
        absmax.ctypes.data,
    )
    return absmax


def dequantize_4bit(
    packed: Array, absmax: Array, quant_type: str, count: int, dtype: DType, blocksize: int = BLOCKSIZE
) -> Array:
    """Dequantize the first ``count`` values: number * absmax in float32, rounded to ``dtype``. All arrays are flat.

    Raises ValueError for too few codes or absmax values, or an unknown block size.
    """
    if len(packed) * 2 < count or len(absmax) * blocksize < count or blocksize not in BLOCKSIZES:
        raise ValueError(f"{len(packed)} bytes and {len(absmax)} blocks of {blocksize} do not hold {count} values")
    packed = np.ascontiguousarray(packed, np.uint8)
    absmax = np.ascontiguousarray(absmax, np.float32)
    numbers = CODES[quant_type]
    values = np.empty(count, BFLOAT16 if dtype == BFLOAT16 else FLOAT32)
    _native.bnb_dequantize_4bit(
        numbers.ctypes.data,
        packed.ctypes.data,
        absmax.ctypes.data,
        blocksize,
        count,
        values.ctypes.data,
        values.dtype == BFLOAT16,
    )
    return cast(values, dtype)


def quantize_8bit(values: Array) -> tuple[Array, Array]:
    """Quantize flat float32 values to the dynamic type in blocks of 256: codes uint8 ``(n,)``, absmax float32 ``(ceil(n
    / 256),)``."""
    values = np.ascontiguousarray(values, np.float32)
    codes = np.empty(len(values), np.uint8)
    absmax = np.empty(-(-len(values) // NESTED_BLOCKSIZE), np.float32)
    _native.bnb_quantize_8bit(
        values.ctypes.data, len(values), dynamic_bins().ctypes.data, codes.ctypes.data, absmax.ctypes.data
    )
    return codes, absmax


def dequantize_8bit(codes: Array, absmax: Array, numbers: Array, blocksize: int = NESTED_BLOCKSIZE) -> Array:
    """``numbers[code] * absmax`` in float32; only the last block may be shorter. All arrays are flat."""
    values: Array = numbers[codes] * np.repeat(absmax, blocksize)[: len(codes)]
    return values


def mean_float32(values: Array) -> np.float32:
    """The mean of a flat float32 array, summed in the order in which torch sums on one thread.

    Rows of 32 values are added column by column, in up to four levels so that no running sum grows long; then the 32
    columns, four vectors of eight, are added up. With several threads torch splits 32,768 or more values among them, so
    that its last bit depends on their number; this function has no such dependence.
    """
    lanes = 8 if len(values) >= 8 else 1
    vectors = len(values) // lanes
    tail = _sum_rows(values[vectors * lanes :])
    folded = _sum_vectors(values[: vectors * lanes].reshape(vectors, lanes))
    total = _sum_rows(np.concatenate([[tail], folded]).astype(np.float32))
    return np.float32(total) / np.float32(len(values))


def _sum_vectors(vectors: Array) -> Array:
    """The sum of (n, lanes) over n: four vectors form a row, rows are added in levels, the four columns are added
    last."""
    rows, lanes = len(vectors) // 4, vectors.shape[1]
    power = max(4, (rows - 1).bit_length() // 4 if rows > 1 else 0)
    level, carried = vectors[: rows * 4].reshape(rows, 4, lanes), []
    for depth in range(4):
        groups = len(level) >> power if depth < 3 else 0
        carried.append(_sum_rows(level[groups << power :]))
        level = _sum_rows(level[: groups << power].reshape(groups, 1 << power, 4, lanes).swapaxes(0, 1))
    columns = _sum_rows(np.stack(carried))
    columns[0] = _sum_rows(np.concatenate([columns[:1], vectors[rows * 4 :]]))
    return _sum_rows(columns)


def _sum_rows(rows: Array) -> Array:
    """The sum over the first axis in sequence, starting from zero; numpy's own sum may add pairwise."""
    total = np.zeros(rows.shape[1:], np.float32)
    for row in rows:
        total = total + row
    return total


@dataclass(frozen=True)
class NestedScales:
    """Doubly quantized absmax values: ``codes`` uint8, and ``absmax``, float32, of the 256 that each belongs to; both
    have the shape of the values.
    """

    codes: Array
    absmax: Array

    @classmethod
    def of(cls, values: Array, offset: float) -> NestedScales:
        """Quantize float32 values of any shape; they start at a multiple of 256 in their tensor."""
        codes, absmax = quantize_8bit(values.reshape(-1) - np.float32(offset))
        wide = np.repeat(absmax, NESTED_BLOCKSIZE)[: values.size]
        return cls(codes.reshape(values.shape), wide.reshape(values.shape))

    def values(self, offset: float) -> Array:
        """The absmax values that the library dequantizes to, float32."""
        values: Array = dynamic_map()[self.codes] * self.absmax + np.float32(offset)
        return values


@dataclass(frozen=True)
class FourBit:
    """Encoder for nf4 or fp4.

    ``dtype``: the dtype of the weight (rows of another dtype are cast to it first); the file records it, and the
    library dequantizes to it. ``nested_offset``: the mean of the tensor's absmax values, which double quantization
    records in decimal; ``surveyed`` computes it, ``parts`` and ``finish`` need it.
    """

    quant_type: str = "nf4"
    double_quant: bool = False
    dtype: DType = QUANT_DTYPES["bfloat16"]
    nested_offset: float | None = None

    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.quant_type not in CODES:
            raise ValueError(f"{self.quant_type!r} is not a 4-bit type")
        if self.dtype not in QUANT_DTYPES.values():
            raise ValueError(f"weights of {self.dtype} cannot be quantized to {self.quant_type}")

    @property
    def name(self) -> str:
        return self.quant_type + ("-dq" if self.double_quant else "")

    @property
    def collects(self) -> tuple[str, ...]:
        return (".absmax",) if self.double_quant else ()

    def surveyed(self, source: LazyTensor, chunk_bytes: int = 16 << 20) -> FourBit:
        """This encoder for one tensor. Double quantization reads the tensor once, for the mean of its absmax values."""
        if not self.double_quant:
            return self
        row_bytes = source.row_size * source.dtype.itemsize
        ranges = row_ranges(source.rows, row_bytes, chunk_bytes, self.row_multiple(source.shape))
        absmax = np.concatenate([absmax_4bit(self._flat(source.load_rows(first, last))) for first, last in ranges])
        offset = float(mean_float32(absmax))
        if not math.isfinite(offset):
            raise InputRefused("quantize.nonfinite", f"{source.origin}: NaN or infinite weights cannot be quantized")
        return replace(self, nested_offset=offset)

    def _flat(self, rows: Array) -> Array:
        """The rows as a flat array of ``dtype``."""
        return cast(rows if rows.dtype != np.float64 else to_float32(rows), self.dtype).reshape(-1)

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        count = math.prod(shape)
        blocks = -(-count // BLOCKSIZE)
        packed = -(-count // 2)
        state = (self._state_suffix, "U8", len(self._state(shape)))
        if self.double_quant:
            rest = [
                (".absmax", "U8", blocks),
                (".nested_absmax", "F32", -(-blocks // NESTED_BLOCKSIZE)),
                (".nested_quant_map", "F32", 256),
                (".quant_map", "F32", 16),
                state,
            ]
            streamed: tuple[Part, ...] = ()
        else:
            rest = [(".quant_map", "F32", 16), state]
            streamed = (Part(".absmax", "F32", (blocks,), 4 * blocks),)
        fixed = (Part(name, dtype, (n,), n * (4 if dtype == "F32" else 1), streamed=False) for name, dtype, n in rest)
        return (Part("", "U8", (packed, 1), packed), *streamed, *fixed)

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        return BLOCKSIZE // math.gcd(math.prod(shape[1:]), BLOCKSIZE)

    def encode(self, rows: Array) -> Mapping[str, Array]:
        packed, absmax = quantize_4bit(self._flat(rows), self.quant_type)
        return {"": packed.reshape(-1, 1), ".absmax": absmax}

    def pack(self, codes: Array, offsets: Array | None, scales: Array) -> Mapping[str, Array]:
        """The result of ``encode`` for rows of whole blocks that are already quantized; scales are absmax values."""
        pairs = codes.reshape(-1, 2)
        return {"": (pairs[:, :1] << 4 | pairs[:, 1:]), ".absmax": scales.reshape(-1)}

    def pack_nested(self, codes: Array, scales: NestedScales) -> Mapping[str, Array]:
        """The same with double quantization: the result also has what ``finish`` needs of the scales."""
        nested = {".absmax": scales.codes.reshape(-1), ".nested_absmax": scales.absmax.reshape(-1)}
        return {**self.pack(codes, None, scales.absmax), **nested}

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        parts = {
            ".quant_map": CODES[self.quant_type],
            self._state_suffix: np.frombuffer(self._state(shape), np.uint8),
        }
        if self.double_quant:
            codes, nested_absmax = self._nested(collected)
            parts |= {".absmax": codes, ".nested_absmax": nested_absmax, ".nested_quant_map": dynamic_map()}
        return parts

    def _nested(self, collected: Mapping[str, Array]) -> tuple[Array, Array]:
        """The codes of the absmax values, and their own absmax values, from what ``encode`` or ``pack_nested`` gave."""
        absmax = collected[".absmax"]
        if ".nested_absmax" in collected:
            return absmax, collected[".nested_absmax"][::NESTED_BLOCKSIZE]
        if float(mean_float32(absmax)) != self.nested_offset:
            raise ValueError("the encoder was surveyed on a different tensor")
        return quantize_8bit(absmax - np.float32(self.nested_offset))

    @property
    def _state_suffix(self) -> str:
        return f".quant_state.bitsandbytes__{self.quant_type}"

    def _state(self, shape: tuple[int, ...]) -> bytes:
        """The JSON that the library stores with the arrays, spelled as it spells it."""
        state: dict[str, object] = {
            "quant_type": self.quant_type,
            "blocksize": BLOCKSIZE,
            "dtype": next(name for name, dtype in QUANT_DTYPES.items() if dtype == self.dtype),
            "shape": list(shape),
        }
        if self.double_quant:
            if self.nested_offset is None:
                raise ValueError("double quantization needs an encoder surveyed on the tensor: see FourBit.surveyed")
            state |= {
                "nested_blocksize": NESTED_BLOCKSIZE,
                "nested_dtype": "float32",
                "nested_offset": self.nested_offset,
            }
        return json.dumps(state).encode()


def quantize_int8(rows: Array) -> tuple[Array, Array]:
    """Quantize a matrix (O, I) to LLM.int8(): codes int8 (O, I) and the absmax of each row, float32 (O,).

    Values are rounded to float16 first. A row with a magnitude of 65520 or more, infinite in float16, has codes 0 and
    infinite absmax.
    """
    rows = kernel_floats(rows)
    n, columns = rows.shape
    codes, absmax = np.empty((n, columns), np.int8), np.empty(n, np.float32)
    _native.bnb_quantize_int8(
        rows.ctypes.data, rows.dtype == BFLOAT16, n, columns, codes.ctypes.data, absmax.ctypes.data
    )
    return codes, absmax


def dequantize_int8(codes: Array, absmax: Array) -> Array:
    """code * absmax / 127 in float32, with the library's constant for 1 / 127: (O, I), (O,) to (O, I)."""
    codes, absmax = np.ascontiguousarray(codes, np.int8), np.ascontiguousarray(absmax, np.float32)
    if absmax.shape != codes.shape[:1]:
        raise ValueError(f"{absmax.shape} scales for codes {codes.shape}")
    values = np.empty(codes.shape, np.float32)
    n, columns = codes.shape
    _native.bnb_dequantize_int8(codes.ctypes.data, absmax.ctypes.data, n, columns, values.ctypes.data)
    return values


@dataclass(frozen=True)
class Int8:
    """Encoder for LLM.int8(): a scale for each row, stored as the row's absmax in a tensor named SCB."""

    name: ClassVar[str] = "int8"
    lossless: ClassVar[bool] = False
    collects: ClassVar[tuple[str, ...]] = ()
    limit: ClassVar[float] = FLOAT16_LIMIT

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, columns = shape
        return (
            Part("", "I8", shape, rows * columns),
            Part("SCB", "F32", (rows,), 4 * rows),
            Part("weight_format", "U8", (), 1, streamed=False),
        )

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        return 1

    def encode(self, rows: Array) -> Mapping[str, Array]:
        codes, absmax = quantize_int8(rows)
        return {"": codes, "SCB": absmax}

    def pack(self, codes: Array, offsets: Array | None, scales: Array) -> Mapping[str, Array]:
        """The result of ``encode`` for rows that are already quantized; a value is code * scale."""
        return {"": codes.view(np.int8), "SCB": scales[:, 0] * np.float32(127)}

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        return {"weight_format": np.zeros((), np.uint8)}  # 0: row-major
