"""HQQ weights as transformers 4 and hqq save them: P.W_q, P.scale, P.zero, and what describes them
(P.shape, P.packing, P.axis, ...) as small tensors, texts as their bytes.

weight = (code - zero) * scale, each operation rounded to the dtype of the scales. The weight's values, in their order,
are the rows of a matrix: of a group each (axis 1), or with a group in each column (axis 0). Codes of rows that are far
apart are packed into one word, the first ones highest. Checked against hqq 0.2.8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.formats.packings.base import QuantizedWeight, ReadPacking
from gemma2tool.formats.packings.parts import (
    FLOATS,
    HINT,
    INT32,
    INT64,
    UINT8,
    cached_array,
    required_matrix,
    required_part,
)
from gemma2tool.model.lazy import Array, LazyTensor, to_float32
from gemma2tool.quantizers.casts import cast
from gemma2tool.quantizers.compressed import round_to
from gemma2tool.storage.quoting import quoted

CODES = ".W_q"
DESCRIBED = ".packing"
_PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}
"""Name of a packing -> bits of a code, codes in a word."""
_LONGEST_NAME = 16
_DESCRIPTION = (
    *("nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale"),
    *("quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise"),
    *("optimize", "round_zero", "scale", "zero"),
)


class HqqPacking(ReadPacking):
    method = "hqq"
    title = "HQQ"

    def weights(
        self, raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object]
    ) -> Iterator[QuantizedWeight]:
        for name in raw:
            if name.endswith(CODES):
                module = name.removesuffix(CODES)
                parts = {name} | {key for part in _DESCRIPTION if (key := f"{module}.{part}") in raw}
                yield QuantizedWeight(f"{module}.weight", _weight(raw, module), parts)


def _weight(raw: Mapping[str, LazyTensor], module: str) -> HqqTensor:
    shape = required_part(raw, f"{module}.shape", (INT64, INT32), (2,)).load().tolist()
    packing, axis = _text(raw, module + DESCRIBED), _number(raw, f"{module}.axis")
    if packing not in _PACKINGS or axis not in (0, 1) or any(_flag(raw, module, end) for end in ("scale", "zero")):
        raise InputRefused(
            "hqq.layout",
            f"{quoted(module)}: the packing {quoted(packing)} along axis {axis}, or quantized scales",
        )
    words, scales = raw[module + CODES], required_matrix(raw, f"{module}.scale", FLOATS)
    zeros = required_part(raw, f"{module}.zero", (scales.dtype,), scales.shape)
    layout = HqqLayout(*_PACKINGS[packing], axis, (shape[0], shape[1]))
    if min(shape) <= 0 or not layout.fits(words, scales):
        raise InputRefused(
            "packing.part-shape",
            f"{words.origin}: words of shape {words.shape} and scales of shape {scales.shape} do not hold a weight"
            f" {tuple(shape)}",
            hint=HINT,
        )
    return HqqTensor(words, scales, zeros, layout)


def _text(raw: Mapping[str, LazyTensor], name: str) -> str:
    stored = required_part(raw, name, (UINT8,), None)
    return stored.load().tobytes().decode("latin-1") if stored.size <= _LONGEST_NAME else ""


def _number(raw: Mapping[str, LazyTensor], name: str) -> int:
    stored = required_part(raw, name, (INT32, INT64, UINT8), None)
    return int(stored.load().reshape(-1)[0]) if stored.size == 1 else -1


def _flag(raw: Mapping[str, LazyTensor], module: str, end: str) -> bool:
    name = f"{module}.quant_{end}"
    return name in raw and _number(raw, name) != 0


@dataclass(frozen=True)
class HqqLayout:
    """How codes are packed: ``bits`` of one, ``per_word`` of them, the axis of a group, the weight's ``shape``."""

    bits: int
    per_word: int
    axis: int
    shape: tuple[int, int]

    def matrix(self, scales: LazyTensor) -> tuple[int, int]:
        """The matrix that the weight is reshaped to, from the number of its groups; (0, 0) if it is not whole."""
        values, groups = self.shape[0] * self.shape[1], scales.size
        if not groups or values % groups:
            return 0, 0
        return (groups, values // groups) if self.axis == 1 else (values // groups, groups)

    def fits(self, words: LazyTensor, scales: LazyTensor) -> bool:
        rows, columns = self.matrix(scales)
        word_bytes = 4 if self.bits == 3 else 1
        expected = -(-rows // self.per_word) * columns * word_bytes
        is_whole = self.bits == 3 or rows % self.per_word == 0
        along = scales.shape == ((rows, 1) if self.axis == 1 else (1, columns))
        return rows > 0 and is_whole and along and words.size * words.dtype.itemsize == expected


class HqqTensor(LazyTensor):
    """A weight (O, I) in the type of its scales."""

    stored = "hqq"

    def __init__(self, words: LazyTensor, scales: LazyTensor, zeros: LazyTensor, layout: HqqLayout) -> None:
        self.words, self.scales, self.zeros, self.layout = words, scales, zeros, layout
        self.shape, self.dtype, self.origin, self.group_size = layout.shape, scales.dtype, words.origin, None

    def load_rows(self, first: int, last: int) -> Array:
        layout, (_, columns) = self.layout, self.layout.matrix(self.scales)
        values = np.arange(first * self.shape[1], last * self.shape[1])
        row, column = np.divmod(values, columns)
        words = cached_array(self.words).view(np.int32 if layout.bits == 3 else np.uint8).reshape(-1, columns)
        place, word = np.divmod(row, len(words))
        shift = layout.bits * (layout.per_word - 1 - place)
        codes = words[word, column].astype(np.int64) >> shift & (1 << layout.bits) - 1
        group = row if layout.axis == 1 else column
        scales, zeros = (to_float32(part.load().reshape(-1))[group] for part in (self.scales, self.zeros))
        result = cast(round_to(self.dtype, codes.astype(np.float32) - zeros) * scales, self.dtype)
        return result.reshape(last - first, self.shape[1])
