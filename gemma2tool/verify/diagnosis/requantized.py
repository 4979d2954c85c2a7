"""Values that lost more than their type loses: quantized twice, or in no way that has a name."""

from __future__ import annotations

import numpy as np

from gemma2tool.model.lazy import Array
from gemma2tool.verify.compare.bounds import BOUNDS
from gemma2tool.verify.diagnosis.pattern import Pattern
from gemma2tool.verify.diagnosis.quantize_dequantize import quantize_dequantize
from gemma2tool.verify.diagnosis.row_sample import RowSample, rms

_BLOCK = 32
_MORE = 1.2
"""Times the error of quantizing once; two roundings to similar steps give 1.4."""
_ON_GRID, _OFF_GRID = 0.1, 0.2
"""RMS distance from a grid, in steps; 0.29 by chance."""
_FINE = 0.06
"""RMSE / RMS up to which a type has so many levels that only 16 of them must come from another type."""
_CORRELATED = 0.5


def quantized_twice(sample: RowSample, stored: str) -> Pattern | None:
    """The values were quantized to a coarser type before, or to this type twice."""
    if sample.correlation < _CORRELATED:
        return None
    if not sample.quantized:
        return _few_values(sample) or _on_integer_grid(sample)
    bound = BOUNDS.get(stored)
    fine = bound is not None and bound.relative_rmse <= _FINE
    return (_few_values(sample) if fine else None) or _larger_error(sample, stored)


def _few_values(sample: RowSample) -> Pattern | None:
    """Fewer different values than the stored type has."""
    columns = sample.source.shape[1]
    for size in (64, 32):
        if columns % size:
            continue
        source, candidate = (_distinct_values(rows.reshape(-1, size)) for rows in (sample.source, sample.candidate))
        if candidate <= 17 and candidate < 0.7 * source:
            template = (
                f"{{what}} {{have}} at most {candidate:.0f} different values in {size}: they were already quantized "
                "to 4 bits or less"
            )
            return Pattern("quant.twice", template, {"distinct": candidate, "group": size})
    return None


def _on_integer_grid(sample: RowSample) -> Pattern | None:
    """Floating-point values that lie on an integer type's grid."""
    columns = sample.source.shape[1]
    for size in (columns, 128, 64, 32):
        if columns % size or not _grid_distance(sample.candidate, size) < _ON_GRID:
            continue
        if _grid_distance(sample.source, size) > _OFF_GRID:
            group = "row" if size == columns else f"group of {size} values"
            template = (
                f"{{what}} {{are}} whole multiples of 1/127 of the largest value of every {group}: they were already "
                "quantized to 8 bits"
            )
            return Pattern("quant.twice", template, {"levels": 127, "group": size})
    return None


def _distinct_values(blocks: Array) -> float:
    """The 90th percentile, over the blocks, of the number of different values."""
    ordered = np.sort(blocks, axis=1)
    return float(np.percentile(1 + (np.diff(ordered, axis=1) != 0).sum(1), 90))


def _grid_distance(rows: Array, size: int) -> float:
    """RMS distance from the nearest of 255 levels, in steps."""
    blocks = rows.reshape(-1, size).astype(np.float64)
    largest = np.abs(blocks).max(1, keepdims=True)
    codes = (127 * blocks / np.maximum(largest, 1e-300))[largest[:, 0] > 0]
    return rms(codes - np.round(codes)) if codes.size else 1.0


def _larger_error(sample: RowSample, stored: str) -> Pattern | None:
    """Most blocks have a larger error than quantizing the source once causes."""
    once = quantize_dequantize(stored, sample.source) if sample.quantized else None
    if once is None or sample.source.shape[1] % _BLOCK:
        return None
    error, error_once = (
        float(np.median(np.sqrt(np.square(rows - sample.source).reshape(-1, _BLOCK).mean(1))))
        for rows in (sample.candidate, once)
    )
    if not error_once or error < _MORE * error_once:
        return None
    ratio = error / error_once
    template = (
        f"{{what}} {{have}} {ratio:.3g} times the error of quantizing to {stored} once: they were quantized twice"
    )
    return Pattern("quant.twice", template, {"times": ratio})


def lossy(sample: RowSample, stored: str) -> Pattern | None:
    """A larger error than the type allows, without a pattern in it."""
    if sample.quantized and sample.correlation > _CORRELATED:
        template = (
            f"{{what}} {{have}} a larger error than {stored} allows: {sample.error:.3g} of the size of the values, "
            "without a pattern"
        )
        return Pattern("quant.lossy", template, {"error": sample.error, "limit": sample.limit})
    return None
