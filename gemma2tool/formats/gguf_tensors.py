"""GGUF's tensors: read row by row, dequantized or as the blocks they are; and a guard for what is about to be quantized."""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.model.lazy import BFLOAT16, FLOAT16, FLOAT32, LazyTensor
from gemma2tool.quantizers.gguf_types import GGUF_TYPES, dequantize, row_bytes
from gemma2tool.storage.gguf import GGUFTensorEntry
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import FileReader

TYPE_NAMES = {row.id: row.name for row in GGUF_TYPES.values()}
FLOATS = {"F32": FLOAT32, "F16": FLOAT16, "BF16": BFLOAT16}


class GGUFTensor(LazyTensor):
    """A tensor of an open file. Float types come in their own dtype, block types dequantized to float32."""

    def __init__(self, reader: FileReader, entry: GGUFTensorEntry) -> None:
        self.reader, self.offset = reader, entry.offset
        self.origin = f"{reader.path.name}: {entry.name}"
        self.shape = tuple(reversed(entry.dims))
        self.type = TYPE_NAMES.get(entry.type_id)
        if self.type is None:
            raise InputRefused(
                "gguf.tensor-type",
                f"{reader.path.name}: {quoted(entry.name)} is of type {entry.type_id}, which this tool cannot dequantize",
                hint=f"types that can be read: {', '.join(GGUF_TYPES)}",
            )
        if self.type not in FLOATS and len(self.shape) != 2:
            raise InputRefused(
                "gguf.tensor-shape",
                f"{reader.path.name}: {quoted(entry.name)} is {self.type} of shape {self.shape}; only matrices are quantized",
                hint="is it a Gemma 2?",
            )
        self.dtype = FLOATS.get(self.type, FLOAT32)
        self.stored = self.type.lower()

    @property
    def bytes_per_row(self) -> int:
        """Stored bytes of one row."""
        if self.type in FLOATS:
            return self.row_size * self.dtype.itemsize
        return row_bytes(self.type, self.row_size)

    def load_blocks(self, first: int, last: int) -> np.ndarray:
        """Rows ``first`` to ``last`` as they are stored: uint8 (last - first, bytes per row)."""
        blocks = np.empty((last - first, self.bytes_per_row), np.uint8)
        if blocks.size:
            self.reader.pread_into(self.offset + first * self.bytes_per_row, blocks.reshape(-1))
        return blocks

    def load_rows(self, first: int, last: int) -> np.ndarray:
        blocks = self.load_blocks(first, last)
        if self.type in FLOATS:
            return blocks.reshape(-1).view(self.dtype).reshape(last - first, *self.shape[1:])
        return dequantize(self.type, blocks, self.row_size)


class StoredBlocks(LazyTensor):
    """The same tensor as the bytes it is stored in: uint8 (rows, bytes per row)."""

    dtype = np.dtype(np.uint8)

    def __init__(self, tensor: GGUFTensor) -> None:
        self.tensor = tensor
        self.shape = (tensor.rows, tensor.bytes_per_row)
        self.stored, self.origin = tensor.stored, tensor.origin

    def load_rows(self, first: int, last: int) -> np.ndarray:
        return self.tensor.load_blocks(first, last)


class WithinFloat16(LazyTensor):
    """``source``, refusing NaN, infinities and magnitudes from 65520 on: a block type keeps its scales in float16, where those become
    infinite and turn the whole block into NaN. (llama-quantize finds them afterwards, in the blocks.)

    Compares the values' bits as integers, whose order is that of floats: two passes in cache, nothing allocated.
    """

    BOUND = 65520.0  # the first value that rounds to a float16 infinity

    def __init__(self, source: LazyTensor, type: str) -> None:
        self.source, self.type = source, type
        self.shape, self.dtype, self.stored, self.origin = source.shape, source.dtype, source.stored, source.origin
        self.signed, self.unsigned = np.dtype(f"i{self.dtype.itemsize}"), np.dtype(f"u{self.dtype.itemsize}")
        bound = np.inf if self.dtype == FLOAT16 else self.BOUND
        self.bound = int(np.array(bound, self.dtype).view(self.unsigned))
        self.sign = 1 << (8 * self.dtype.itemsize - 1)

    def load_rows(self, first: int, last: int) -> np.ndarray:
        rows = self.source.load_rows(first, last)
        flat = rows.reshape(-1)
        if flat.size and (flat.view(self.signed).max() >= self.bound or flat.view(self.unsigned).max() >= self.sign + self.bound):
            self._refuse(rows.astype(np.float64), first)
        return rows

    def _refuse(self, values: np.ndarray, first: int) -> NoReturn:
        finite = np.isfinite(values)
        place = np.argwhere(np.abs(values) >= self.BOUND if finite.all() else ~finite)[0]
        where = f"{self.origin}: the value at {(int(place[0]) + first, *map(int, place[1:]))} is {values[tuple(place)]:g}"
        if not finite.all():
            raise InputRefused("weights.nonfinite", where, hint="the checkpoint is damaged: fetch it again")
        raise InputRefused(
            "weights.f16-overflow",
            f"{where}, beyond float16, in which {self.type} keeps its scales",
            hint="use --dtype bf16 or f32",
        )
