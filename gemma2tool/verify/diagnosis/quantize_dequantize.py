"""What a type makes of values when it is used as it should be: the yardstick for values that lost more."""

from __future__ import annotations

import numpy as np

from gemma2tool.quantizers import bnb
from gemma2tool.quantizers.gguf_types import GGUF_TYPES, dequantize, quantize


def quantized_once(stored: str, rows: np.ndarray) -> np.ndarray | None:
    """Float32 ``rows`` (n, columns) as they come back from ``stored``; None for types that cannot be made of some rows alone."""
    columns = rows.shape[1]
    kind = GGUF_TYPES.get(stored.upper())
    if kind is not None:
        if kind.needs_importance or columns % kind.block_elements:
            return None
        return dequantize(kind.name, quantize(kind.name, np.ascontiguousarray(rows)), columns)
    code = stored.removesuffix("-dq")
    if code in ("nf4", "fp4") and columns % bnb.BLOCKSIZE == 0:
        flat = np.ascontiguousarray(rows).reshape(-1)
        packed, absmax = bnb.quantize_4bit(flat, code)
        return bnb.dequantize_4bit(packed, absmax, code, flat.size, np.dtype(np.float32)).reshape(rows.shape)
    if stored == "int8":
        return bnb.dequantize_int8(*bnb.quantize_int8(rows))
    return None
