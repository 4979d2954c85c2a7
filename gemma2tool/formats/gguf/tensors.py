"""GGUF's tensors: read row by row, dequantized or as the blocks they are."""

from __future__ import annotations

import numpy as np

from gemma2tool.containers.gguf import GGUFTensorEntry
from gemma2tool.errors import InputRefused
from gemma2tool.model.lazy import BFLOAT16, FLOAT16, FLOAT32, LazyTensor
from gemma2tool.quantizers.gguf_types import GGUF_TYPES, dequantize, row_bytes
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
        type_name = TYPE_NAMES.get(entry.type_id)
        if type_name is None:
            raise InputRefused(
                "gguf.tensor-type",
                f"{reader.path.name}: {quoted(entry.name)} is of type {entry.type_id},"
                " which gemma2tool cannot dequantize",
                hint=f"types that can be read: {', '.join(GGUF_TYPES)}",
            )
        self.type: str = type_name
        if self.type not in FLOATS and len(self.shape) != 2:
            raise InputRefused(
                "gguf.tensor-shape",
                f"{reader.path.name}: {quoted(entry.name)} is {self.type} of shape {self.shape};"
                " only matrices are quantized",
                hint="check that the file is a Gemma 2 model",
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
