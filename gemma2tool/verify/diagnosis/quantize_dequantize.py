"""What a type does to values when it is used correctly: the yardstick for values that lost more."""

from __future__ import annotations

import numpy as np

from gemma2tool.model.lazy import FLOAT32, Array
from gemma2tool.quantizers import bnb
from gemma2tool.quantizers.gguf_types import GGUF_TYPES, dequantize, quantize


def quantize_dequantize(stored: str, rows: Array) -> Array | None:
    """Float32 ``rows`` (n, columns) quantized to ``stored`` and back; None for types that need more than some of the
    rows."""
    columns = rows.shape[1]
    gguf_type = GGUF_TYPES.get(stored.upper())
    if gguf_type is not None:
        if gguf_type.needs_importance or columns % gguf_type.block_elements:
            return None
        return dequantize(gguf_type.name, quantize(gguf_type.name, np.ascontiguousarray(rows)), columns)
    code = stored.removesuffix("-dq")
    if code in ("nf4", "fp4") and columns % bnb.BLOCKSIZE == 0:
        flat = np.ascontiguousarray(rows).reshape(-1)
        packed, absmax = bnb.quantize_4bit(flat, code)
        return bnb.dequantize_4bit(packed, absmax, code, flat.size, FLOAT32).reshape(rows.shape)
    if stored == "int8":
        return bnb.dequantize_int8(*bnb.quantize_int8(rows))
    return None
