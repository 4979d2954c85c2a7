"""Conversions between float32, float16 and bfloat16 at memory bandwidth, and the search for NaN and infinity."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from gemma2tool.model.lazy import Array, DType
from gemma2tool.quantizers.kernels import _native

_NAMES = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16", np.dtype(ml_dtypes.bfloat16): "bf16"}


def cast(array: Array, dtype: DTypeLike, out: Array | None = None) -> Array:
    """Convert ``array`` from float32, float16 or ``ml_dtypes.bfloat16`` to any of the three; same shape.

    Rounds to nearest even; float16 overflow gives infinity. NaN stays NaN, keeps its sign and gets the bits that ggml
    writes: 0x7E00 in float16, the upper half with the quiet bit set in bfloat16. Returns ``array`` itself if the dtype
    is the same and ``out`` is None.

    Raises:
        ValueError: for another dtype, or an ``out`` that has another shape or dtype or is not C-contiguous.
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


def count_nonfinite(array: Array) -> int:
    """Count the elements of a float32, float16 or bfloat16 array that are NaN or infinite."""
    array = np.ascontiguousarray(array)
    return _native.count_nonfinite(_name(array.dtype), array.ctypes.data, array.size)


def any_beyond(array: Array, limit: float = math.inf) -> bool:
    """Whether any value of a float32, float16, bfloat16 or float64 array is NaN, infinite, or of magnitude ``limit`` or
    more.

    For a finite limit the bits are compared as integers, which have the order of floats: two passes, no allocation.
    """
    if not array.size:
        return False
    if array.dtype in _NAMES and math.isinf(limit):
        return count_nonfinite(array) > 0
    width = 8 * array.dtype.itemsize
    flat = np.ascontiguousarray(array).reshape(-1)
    with np.errstate(over="ignore"):
        # Infinity where the dtype does not reach the limit.
        bound = int(np.array(limit, array.dtype).view(f"u{width // 8}"))
    positive, negative = flat.view(f"i{width // 8}").max(), flat.view(f"u{width // 8}").max()
    return bool(positive >= bound or int(negative) >= (1 << (width - 1)) + bound)


def _name(dtype: DType) -> str:
    try:
        return _NAMES[dtype]
    except KeyError:
        raise ValueError(f"cannot cast from or to {dtype}; only float32, float16 and bfloat16") from None
