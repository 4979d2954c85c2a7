"""Small unsigned integers packed into 32-bit words: element i of a word starts at bit i * bits."""

from __future__ import annotations

import sys

import numpy as np

from gemma2tool.model.lazy import Array
from gemma2tool.quantizers.kernels import _native

WORD_BITS = 32
_STRIP = 128


def pack_words(codes: Array, bits: int) -> Array:
    """Pack uint8 codes below 2**bits, (..., n), into uint32 (..., n * bits / 32). ``bits`` is 4 or 8, n a multiple of
    32 / bits."""
    per_word = _per_word(bits)
    if codes.shape[-1] % per_word:
        raise ValueError(f"{codes.shape[-1]} codes of {bits} bits do not fill whole words")
    codes = np.ascontiguousarray(codes, np.uint8)
    if bits == 4:
        packed = np.empty((*codes.shape[:-1], codes.shape[-1] // 2), np.uint8)
        _native.pack_nibbles(codes.ctypes.data, packed.size, packed.ctypes.data)
        codes = packed
    return codes.view("<u4").astype(np.uint32, copy=False)


def unpack_words(words: Array, bits: int) -> Array:
    """The inverse of ``pack_words``: 32-bit words (..., n) to uint8 codes (..., n * 32 / bits)."""
    _per_word(bits)
    values = np.ascontiguousarray(words)
    if sys.byteorder != "little":
        values = values.byteswap()
    values = values.view(np.uint8)
    if bits == 8:
        return values
    codes = np.empty((*values.shape[:-1], values.shape[-1] * 2), np.uint8)
    _native.unpack_nibbles(values.ctypes.data, values.size, codes.ctypes.data)
    return codes


def transposed(matrix: Array) -> Array:
    """The transpose of (n, m), C-contiguous. Copies strip by strip so that the written lines stay in cache: three times
    as fast."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    for first in range(0, len(matrix), _STRIP):
        result[:, first : first + _STRIP] = matrix[first : first + _STRIP].T
    return result


def _per_word(bits: int) -> int:
    if bits not in (4, 8):
        raise ValueError(f"codes must have 4 or 8 bits, not {bits} bits")
    return WORD_BITS // bits
