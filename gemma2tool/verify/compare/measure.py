"""The arithmetic of the tensor comparison: errors of one range of rows, and their sum over a tensor.

Nothing here knows names or messages. The passes over the values are ``quantizers.comparison``'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from gemma2tool.model.lazy import Array
from gemma2tool.quantizers.comparison import BlockErrors, ErrorSums, compare_blocks, count_differing, sum_errors
from gemma2tool.verify.compare.block_limits import BlockLimits
from gemma2tool.verify.compare.bounds import Bound


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


def measure_bits(required: Array, actual: Array, source: Array | None) -> Errors:
    """Compare two arrays of one dtype bit for bit.

    ``source``: the values that errors are measured against; None if they are ``required``.
    """
    differing, first = count_differing(required, actual)
    result = _errors(sum_errors(required if source is None else source, actual), actual.size)
    result.differing = differing
    if differing:
        result.first_difference = Difference(
            first, float(required.reshape(-1)[first]), float(actual.reshape(-1)[first])
        )
    return result


def measure_blocks(source: Array, actual: Array, block: int, bound: Bound | None) -> Errors:
    """Errors of ``actual`` against ``source``, and, if there is a bound, per block of ``block`` values."""
    if bound is None:
        return _errors(sum_errors(source, actual), actual.size)
    sums, blocks = compare_blocks(source, actual, block, with_anchor=math.isfinite(bound.anchor))
    result = _errors(sums, actual.size)
    result.blocks = blocks
    return result


def _errors(sums: ErrorSums, values: int) -> Errors:
    has_nonfinite = sums.nonfinite or sums.source_nonfinite
    return Errors(
        values=values,
        signal=sums.signal,
        noise=sums.noise,
        bias=math.nan if has_nonfinite else sums.bias,
        max_abs_error=sums.largest,
        nonfinite=sums.nonfinite,
        source_nonfinite=sums.source_nonfinite,
        first_nonfinite=sums.first_nonfinite,
    )


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
