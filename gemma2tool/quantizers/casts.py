"""Conversions between float32, float16 and bfloat16 at the speed of memory, and the search for NaN and infinities."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from gemma2tool.quantizers.kernels import _native

_NAMES = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16", np.dtype(ml_dtypes.bfloat16): "bf16"}


def cast(array: np.ndarray, dtype: np.dtype | type, out: np.ndarray | None = None) -> np.ndarray:
    """``array`` in ``dtype``: float32, float16 or ``ml_dtypes.bfloat16`` to any of the three, same shape.

    Rounds to nearest even; float16 overflow gives infinities. NaN stays NaN with its sign, with the bits ggml writes: 0x7E00 in
    float16, the upper half with the quiet bit set in bfloat16. Without ``out`` and with nothing to convert, returns ``array`` itself.

    Raises:
        ValueError: for another dtype, or an ``out`` of another shape or dtype or that is not C-contiguous.
    """
    source, target = _name(array.dtype), _name(np.dtype(dtype))
    if out is None and source == target:
        return array
    if out is None:
        out = np.empty(array.shape, dtype)
    elif out.shape != array.shape or out.dtype != dtype or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(f"out must be C-contiguous {array.shape} of {np.dtype(dtype)}, not {out.shape} of {out.dtype}")
    if source == target:
        np.copyto(out, array)
        return out
    array = np.ascontiguousarray(array)
    _native.cast(source, target, array.ctypes.data, out.ctypes.data, array.size)
    return out


def count_nonfinite(array: np.ndarray) -> int:
    """How many elements of a float32, float16 or bfloat16 array are NaN or infinite."""
    array = np.ascontiguousarray(array)
    return _native.count_nonfinite(_name(array.dtype), array.ctypes.data, array.size)


def _name(dtype: np.dtype) -> str:
    try:
        return _NAMES[dtype]
    except KeyError:
        raise ValueError(f"no cast from or to {dtype}; float32, float16 and bfloat16 only") from None
