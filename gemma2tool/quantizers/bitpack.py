"""Small unsigned integers packed into 32-bit words: a stream of bits in which element i starts at bit i * bits.

Bits count from the lowest of the first byte. Elements of 3, 5 and 6 bits may span two words.
"""

from __future__ import annotations

import sys

import numpy as np

from gemma2tool.model.lazy import Array
from gemma2tool.quantizers.kernels import _native

WORD_BITS = 32
BITS = (1, 2, 3, 4, 5, 6, 8)
"""The widths that codes may have."""
_STRIP = 128


def pack_words(codes: Array, bits: int) -> Array:
    """Pack uint8 codes below 2**bits, (..., n), into uint32 (..., n * bits / 32). ``bits`` is one of BITS, and the
    codes fill whole words."""
    if bits not in BITS:
        raise ValueError(f"codes of {bits} bits are not packed")
    if codes.shape[-1] * bits % WORD_BITS:
        raise ValueError(f"{codes.shape[-1]} codes of {bits} bits do not fill whole words")
    codes = np.ascontiguousarray(codes, np.uint8)
    if bits == 4:
        codes = pack_nibbles(codes)
    elif bits < 8:
        codes = _pack_eights(codes, bits)
    return codes.view("<u4").astype(np.uint32, copy=False)


def unpack_words(words: Array, bits: int) -> Array:
    """The inverse of ``pack_words``: 32-bit words (..., n) to uint8 codes (..., n * 32 / bits).

    Of 3, 5 and 6 bits, n must be a multiple of ``bits``.
    """
    if bits not in BITS:
        raise ValueError(f"codes of {bits} bits are not unpacked")
    values = np.ascontiguousarray(words)
    if sys.byteorder != "little":
        values = values.byteswap()
    values = values.view(np.uint8)
    if bits == 8:
        return values
    if bits == 4:
        return unpack_nibbles(values)
    return _unpack_eights(values, bits)


def pack_nibbles(codes: Array) -> Array:
    """Pack uint8 codes below 16, (..., n), into bytes (..., n / 2), the first code in the low half."""
    codes = np.ascontiguousarray(codes, np.uint8)
    packed = np.empty((*codes.shape[:-1], codes.shape[-1] // 2), np.uint8)
    _native.pack_nibbles(codes.ctypes.data, packed.size, packed.ctypes.data)
    return packed


def unpack_nibbles(packed: Array) -> Array:
    """The inverse of ``pack_nibbles``."""
    packed = np.ascontiguousarray(packed, np.uint8)
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    _native.unpack_nibbles(packed.ctypes.data, packed.size, codes.ctypes.data)
    return codes


def _pack_eights(codes: Array, bits: int) -> Array:
    """Eight codes at a time in one 64-bit number: neighbors are joined to pairs, pairs to fours, fours to eights."""
    eights = codes.view("<u8").astype(np.uint64, copy=False)
    for width, low in _JOINS:
        gap = np.uint64(width - bits * width // 8)
        eights = (eights & low) | ((eights & ~low) >> gap)
    return np.ascontiguousarray(_as_bytes(eights)[..., :bits]).reshape(*codes.shape[:-1], -1)


def _unpack_eights(values: Array, bits: int) -> Array:
    packed = np.zeros((*values.shape[:-1], values.shape[-1] // bits, 8), np.uint8)
    packed[..., :bits] = values.reshape(*packed.shape[:-1], bits)
    eights = packed.view("<u8").astype(np.uint64, copy=False)
    for width, low in reversed(_JOINS):
        joined = bits * width // 8
        mask = low & np.uint64(_repeated((1 << joined) - 1, 2 * width))
        eights = (eights & mask) | ((eights << np.uint64(width - joined)) & (mask << np.uint64(width)))
    return _as_bytes(eights).reshape(*values.shape[:-1], -1)


def _as_bytes(eights: Array) -> Array:
    """The bytes of 64-bit numbers, lowest first: (..., n) to (..., n, 8)."""
    return eights.astype("<u8", copy=False).view(np.uint8).reshape(*eights.shape, 8)


def _repeated(pattern: int, width: int) -> int:
    """A 64-bit number that repeats ``pattern`` every ``width`` bits."""
    return sum(pattern << shift for shift in range(0, 64, width))


_JOINS = tuple((width, np.uint64(_repeated((1 << width) - 1, 2 * width))) for width in (8, 16, 32))
"""The steps of packing: the width of a half in bits, and the mask of the lower halves."""


def transposed(matrix: Array) -> Array:
    """The transpose of (n, m), C-contiguous. Copies strip by strip so that the written lines stay in cache: three times
    as fast."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    for first in range(0, len(matrix), _STRIP):
        result[:, first : first + _STRIP] = matrix[first : first + _STRIP].T
    return result
