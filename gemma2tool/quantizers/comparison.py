"""Errors of decoded values against those that they were made from, in one pass: sums, and the largest of each block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma2tool.model.lazy import BFLOAT16, FLOAT32, Array, to_float32
from gemma2tool.quantizers.kernels import _native

Floats = NDArray[np.float32]

_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class BlockErrors:
    """Per block: ``absmax``, the largest magnitude in the source; ``worst``, the largest error; ``anchor``, the error
    of the first value of largest magnitude (None if not asked for)."""

    absmax: Floats
    worst: Floats
    anchor: Floats | None

    @classmethod
    def concatenated(cls, parts: list[BlockErrors]) -> BlockErrors:
        anchors = [part.anchor for part in parts if part.anchor is not None]
        return cls(
            np.concatenate([part.absmax for part in parts]),
            np.concatenate([part.worst for part in parts]),
            np.concatenate(anchors) if anchors else None,
        )


@dataclass(frozen=True)
class ErrorSums:
    """Sums over all pairs of which both are finite, in double precision.

    ``signal``: of the squares of the source's values; ``noise``: of the errors' squares; ``bias``: of the errors.
    ``largest``: the largest error. ``nonfinite``: number of values of the candidate that are NaN or infinite;
    ``first_nonfinite``: index of the first (-1 if there is none). ``source_nonfinite``: the same number of the source.
    """

    signal: float
    noise: float
    bias: float
    largest: float
    nonfinite: int
    source_nonfinite: int
    first_nonfinite: int


def sum_errors(source: Array, actual: Array) -> ErrorSums:
    """Errors of ``actual`` against ``source``: two arrays of one size, of any float type."""
    return _compare(source, actual, max(actual.size, 1), 0, 0, 0)


def compare_blocks(source: Array, actual: Array, block: int, *, with_anchor: bool) -> tuple[ErrorSums, BlockErrors]:
    """The same, and the errors of each block of ``block`` values; the last may be shorter.

    The result does not depend on the instruction set. A pair of which one value is not finite counts as two zeros.
    """
    blocks = -(-actual.size // block)
    errors = BlockErrors(
        np.empty(blocks, FLOAT32), np.empty(blocks, FLOAT32), np.empty(blocks, FLOAT32) if with_anchor else None
    )
    anchor = 0 if errors.anchor is None else errors.anchor.ctypes.data
    return _compare(source, actual, block, errors.absmax.ctypes.data, errors.worst.ctypes.data, anchor), errors


def count_differing(a: Array, b: Array) -> tuple[int, int]:
    """How many values of two arrays of one size and dtype differ in their bits, and the index of the first (-1 if there
    is none)."""
    unsigned = _UNSIGNED[a.dtype.itemsize]
    a_bits, b_bits = (np.ascontiguousarray(side).reshape(-1).view(unsigned) for side in (a, b))
    if a.dtype.itemsize == 8:
        unequal = a_bits != b_bits
        count, first = int(np.count_nonzero(unequal)), int(unequal.argmax()) if unequal.size else 0
    else:
        count, first = _native.count_differing(a_bits.ctypes.data, b_bits.ctypes.data, a.dtype.itemsize, a.size)
    return count, first if count else -1


def _compare(source: Array, actual: Array, block: int, absmax: int, worst: int, anchor: int) -> ErrorSums:
    if source.size != actual.size:
        raise ValueError(f"{source.size} values cannot be compared with {actual.size}")
    source, actual = _float32_or_bfloat16(source), _float32_or_bfloat16(actual)
    return ErrorSums(
        *_native.compare_blocks(
            source.ctypes.data,
            source.dtype == BFLOAT16,
            actual.ctypes.data,
            actual.dtype == BFLOAT16,
            actual.size,
            block,
            absmax,
            worst,
            anchor,
        )
    )


def _float32_or_bfloat16(values: Array) -> Array:
    return np.ascontiguousarray(values if values.dtype == BFLOAT16 else to_float32(values))
