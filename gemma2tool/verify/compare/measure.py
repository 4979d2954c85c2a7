"""The arithmetic of the tensor comparison: errors of one range of rows, and their sum over a tensor.

Nothing here knows names or messages. Arrays are never larger than the range; sums are in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from gemma2tool.model.lazy import Array, to_float32
from gemma2tool.verify.compare.block_limits import BlockErrors, BlockLimits
from gemma2tool.verify.compare.bounds import Bound

_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Difference:
    """A value that is not the required one: its flat index, the required value and the actual one."""

    index: int
    required: float
    actual: float


@dataclass
class Errors:
    """Errors of a range of rows, or of a whole tensor. Indexes are flat, from the first value of the range or tensor.

    ``signal``: sum of the squares of the source's values; ``noise``: of the errors. ``bias``: sum of the signed errors.
    ``differing``: values whose bits are not the required ones. ``blocks``: None if the type has no bound.
    """

    values: int
    signal: float = 0.0
    noise: float = 0.0
    bias: float = 0.0
    max_abs_error: float = 0.0
    nonfinite: int = 0
    source_nonfinite: int = 0
    first_nonfinite: int = -1
    differing: int = 0
    first_difference: Difference | None = None
    blocks: BlockErrors | None = None


def measure_bits(required: Array, actual: Array, source: Callable[[], NDArray[np.float32]] | None) -> Errors:
    """Compare two arrays of one dtype bit for bit.

    ``source``: returns the float32 values that errors are measured against; None if they are ``required``, in which
    case errors are not measured while the bits agree.
    """
    result = Errors(actual.size)
    unsigned = _UNSIGNED[actual.dtype.itemsize]
    required_bits = np.ascontiguousarray(required).reshape(-1).view(unsigned)
    actual_bits = np.ascontiguousarray(actual).reshape(-1).view(unsigned)
    is_equal = np.array_equal(required_bits, actual_bits)
    if not is_equal:
        unequal = required_bits != actual_bits
        at = int(unequal.argmax())
        result.differing = int(np.count_nonzero(unequal))
        result.first_difference = Difference(at, float(required.reshape(-1)[at]), float(actual.reshape(-1)[at]))
    values = to_float32(actual).reshape(-1)
    if is_equal and source is None:
        result.signal = _square_sum(values)
        if not np.isfinite(result.signal):
            _count_nonfinite(result, values, values)
        return result
    _measure_errors(result, (to_float32(required) if source is None else source()).reshape(-1), values)
    return result


def measure_blocks(source: NDArray[np.float32], actual: NDArray[np.float32], block: int, bound: Bound | None) -> Errors:
    """Errors of ``actual`` against ``source``, and, if there is a bound, per block of ``block`` values."""
    source, actual = source.reshape(-1), actual.reshape(-1)
    result = Errors(actual.size)
    errors = _measure_errors(result, source, actual)
    if bound is not None:
        result.blocks = BlockErrors.of(np.abs(source), errors, block, with_anchor=math.isfinite(bound.anchor))
    return result


def _measure_errors(result: Errors, source: NDArray[np.float32], actual: NDArray[np.float32]) -> NDArray[np.float32]:
    """Fill in the sums; returns the absolute errors, 0 where a side is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        errors = actual - source
        result.bias = float(errors.sum())
        np.abs(errors, out=errors)
        result.signal, result.noise = _square_sum(source), _square_sum(errors)
        if not (np.isfinite(result.signal) and np.isfinite(result.noise)):
            _count_nonfinite(result, source, actual)
            nonfinite = ~np.isfinite(errors)
            errors[nonfinite] = 0.0
            finite = np.where(nonfinite, np.float32(0), source).astype(np.float64)
            result.signal, result.noise = _square_sum(finite), _square_sum(errors.astype(np.float64))
    result.max_abs_error = float(errors.max(initial=0.0))
    return errors


def _square_sum(values: Array) -> float:
    return float(np.dot(values, values))


def _count_nonfinite(result: Errors, source: Array, actual: Array) -> None:
    nonfinite = ~np.isfinite(actual)
    result.nonfinite = int(np.count_nonzero(nonfinite))
    result.source_nonfinite = int(np.count_nonzero(~np.isfinite(source)))
    if result.nonfinite:
        result.first_nonfinite = int(nonfinite.argmax())


@dataclass
class TensorErrors:
    """Sums the errors of a tensor's ranges, in order. ``limits``: None if the type has no bound."""

    limits: BlockLimits | None
    total: Errors = field(default_factory=lambda: Errors(0))

    def add(self, errors: Errors) -> None:
        total = self.total
        if errors.first_difference is not None and total.first_difference is None:
            first = errors.first_difference
            total.first_difference = replace(first, index=total.values + first.index)
        if errors.nonfinite and not total.nonfinite:
            total.first_nonfinite = total.values + errors.first_nonfinite
        total.signal += errors.signal
        total.noise += errors.noise
        total.bias += errors.bias
        total.nonfinite += errors.nonfinite
        total.source_nonfinite += errors.source_nonfinite
        total.differing += errors.differing
        total.max_abs_error = max(total.max_abs_error, errors.max_abs_error)
        if self.limits is not None and errors.blocks is not None:
            self.limits.add(total.values, errors.blocks)
        total.values += errors.values

    def systematic_error(self) -> float:
        """The mean error if rounding to nearest cannot explain it; else 0. See ``BlockLimits.allows_mean``."""
        total = self.total
        mean = total.bias / max(total.values, 1)
        if self.limits is None or not math.isfinite(mean):
            return 0.0
        return 0.0 if self.limits.allows_mean(mean, total.noise / max(total.values, 1)) else mean
