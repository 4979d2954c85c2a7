"""GGUF's tensors: read row by row, dequantized or as stored blocks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemma2tool.containers.gguf import GGUFTensorEntry
from gemma2tool.errors import InputRefused
from gemma2tool.model.lazy import BFLOAT16, FLOAT16, FLOAT32, Array, LazyTensor
from gemma2tool.quantizers.gguf_types import GGUF_TYPES, dequantize, row_bytes
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import FileReader

TYPE_NAMES = {row.id: row.name for row in GGUF_TYPES.values()}
FLOATS = {"F32": FLOAT32, "F16": FLOAT16, "BF16": BFLOAT16}


class GGUFTensor(LazyTensor):
    """A tensor of an open file. A float type keeps its dtype, a block type is dequantized to float32."""

    def __init__(self, reader: FileReader, entry: GGUFTensorEntry) -> None:
        self.reader, self.offset = reader, entry.offset
        self.origin = f"{reader.path.name}: {entry.name}"
        self.shape = tuple(reversed(entry.dims))
        if entry.type_id not in TYPE_NAMES:
            raise InputRefused(
                "gguf.tensor-type",
                f"{reader.path.name}: {quoted(entry.name)} is of type {entry.type_id}, which cannot be dequantized",
                hint=f"types that can be read: {', '.join(GGUF_TYPES)}",
            )
        self.type = TYPE_NAMES[entry.type_id]
        if self.type not in FLOATS and len(self.shape) != 2:
            raise InputRefused(
                "gguf.tensor-shape",
                f"{reader.path.name}: {quoted(entry.name)} is {self.type} of shape {self.shape}; only matrices can be"
                " quantized",
            )
        self.dtype = FLOATS.get(self.type, FLOAT32)
        self.stored = self.type.lower()

    @property
    def bytes_per_row(self) -> int:
        """Stored bytes of one row."""
        if self.type in FLOATS:
            return self.row_size * self.dtype.itemsize
        return row_bytes(self.type, self.row_size)

    def load_blocks(self, first: int, last: int) -> NDArray[np.uint8]:
        """Rows ``first`` to ``last`` as they are stored: uint8 (last - first, bytes per row)."""
        blocks = np.empty((last - first, self.bytes_per_row), np.uint8)
        if blocks.size:
            start, ahead = self.offset + first * self.bytes_per_row, (self.rows - last) * self.bytes_per_row
            self.reader.pread_into(start, blocks.reshape(-1), ahead=ahead)
        return blocks

    def announce(self, first: int = 0, last: int | None = None) -> None:
        rows = (self.rows if last is None else last) - first
        self.reader.announce(self.offset + first * self.bytes_per_row, rows * self.bytes_per_row)

    def load_rows(self, first: int, last: int) -> Array:
        blocks = self.load_blocks(first, last)
        if self.type in FLOATS:
            return blocks.reshape(-1).view(self.dtype).reshape(last - first, *self.shape[1:])
        return dequantize(self.type, blocks, self.row_size)


class StoredBlocks(LazyTensor):
    """The same tensor as its stored bytes: uint8 (rows, bytes per row)."""

    dtype = np.dtype(np.uint8)

    def __init__(self, tensor: GGUFTensor) -> None:
        self.tensor = tensor
        self.shape = (tensor.rows, tensor.bytes_per_row)
        self.stored, self.origin = tensor.stored, tensor.origin

    def load_rows(self, first: int, last: int) -> Array:
        return self.tensor.load_blocks(first, last)
