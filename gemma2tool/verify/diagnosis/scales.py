"""Unknown factors and offsets: of a whole tensor, of its rows, of its quantization groups."""

from __future__ import annotations

import math

import numpy as np

from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import Array
from gemma2tool.verify.diagnosis.names import NORMS, place
from gemma2tool.verify.diagnosis.pattern import Pattern
from gemma2tool.verify.diagnosis.row_sample import RowSample

_GROUP_SIZES = (256, 128, 64, 32)
_SAME_SIGN = 0.95
"""Share of groups that an offset of the zero point moves in the same direction."""
_FINER = 0.85
"""A factor per row or group is preferred to a coarser one if it leaves less than this share of the error."""
_LOCAL = 0.7
"""If more than this share of the groups is correct, the others are local damage."""
_STEADY = 0.12
"""Relative spread of something constant."""
_STEADY_STEPS = 0.5
"""The same for an offset in quantization steps, which rounding blurs."""
_ZERO_POINT_ERROR = 0.55
"""Share of the error that an offset of every group may leave."""

_Scored = tuple[float, Pattern]
"""A pattern, and how little of the difference it leaves (smaller is better)."""


def factors_and_offsets(sample: RowSample, config: Gemma2Config) -> Pattern | None:
    """The tensor, its rows or its groups times a factor or plus an offset; the finer division only where it explains
    markedly more."""
    if len(sample.source) == 1:
        uniform = _uniform(sample, config)
        return None if uniform is None else uniform[1]
    coarse, fine = _uniform(sample, config), _factor_per_group(sample)
    if coarse is None or fine is None:
        scored = coarse or fine
        return None if scored is None else scored[1]
    return fine[1] if fine[0] < _FINER * coarse[0] else coarse[1]


def _uniform(sample: RowSample, config: Gemma2Config) -> _Scored | None:
    """candidate = factor * source, or, for vectors, source + offset."""
    source, candidate = sample.source.astype(np.float64), sample.candidate.astype(np.float64)
    square = float(np.mean(source**2))
    factor = float(np.mean(source * candidate)) / square if square else 0.0
    if factor and sample.is_explained_by(factor * source):
        error = sample.error_of(factor * sample.source)
        return error, _scaled(sample, factor, error, config)
    offset = float(np.mean(candidate - source))
    if len(source) == 1 and sample.is_explained_by(source + offset):
        return 0.0, Pattern("tensor.offset", f"{{what}} {{are}} larger by {offset:.6g} everywhere", {"offset": offset})
    if place(sample.name).kind in NORMS:
        scale = source + 1
        factor = float(np.mean(scale * (candidate + 1)) / np.mean(scale**2))
        if sample.is_explained_by(factor * scale - 1):
            template = f"in {{what}}, 1 + w is {factor:.6g} times the source's: 1 + w was multiplied instead of w"
            return 0.0, Pattern("norm.rescaled", template, {"factor": factor})
    return _affine(sample)


def _affine(sample: RowSample) -> _Scored | None:
    """candidate = factor * source + offset."""
    source, candidate = sample.source.astype(np.float64), sample.candidate.astype(np.float64)
    centered = source - source.mean()
    variance = float(np.mean(centered**2))
    factor = float(np.mean(centered * candidate)) / variance if variance else 0.0
    offset = float(candidate.mean() - factor * source.mean())
    if not factor or not sample.is_explained_by(factor * source + offset):
        return None
    error = sample.error_of(factor * source + offset)
    template = f"{{what}} {{are}} {factor:.6g} times the source's plus {offset:.6g}"
    return error, Pattern("tensor.scaled", template, {"factor": factor, "offset": offset, "error": error})


def _scaled(sample: RowSample, factor: float, error: float, config: Gemma2Config) -> Pattern:
    evidence = {"factor": factor, "error": error}
    for formula, value in (
        ("query_pre_attn_scalar ** -0.5", config.query_scale),
        ("query_pre_attn_scalar ** 0.5", 1 / config.query_scale),
        ("head_dim ** -0.5", config.head_dim**-0.5),
        ("head_dim ** 0.5", config.head_dim**0.5),
    ):
        if place(sample.name).kind == "q_proj" and math.isclose(factor, value, rel_tol=max(sample.limit / 4, 1e-3)):
            return Pattern(
                "attention.query-scale-folded",
                f"{{what}} {{are}} multiplied by {formula}: the scale of the attention scores is in the weights as "
                "well as in the config",
                evidence,
            )
    return Pattern("tensor.scaled", f"{{what}} {{are}} {factor:.6g} times the source's", evidence)


def zero_point(sample: RowSample) -> Pattern | None:
    """Every quantization group, or every row, of a matrix is off by one step."""
    if len(sample.source) == 1:
        return None
    scored = [result for size in _group_sizes(sample) if (result := _offset_per_group(sample, size))]
    return min(scored, key=lambda result: result[0])[1] if scored else None


def _factor_per_group(sample: RowSample) -> _Scored | None:
    """Every group, or every row, is multiplied by its own factor."""
    best: _Scored | None = None
    for size in _group_sizes(sample):
        result = _factors(sample, size)
        if result and (best is None or result[0] < _FINER * best[0]):
            best = result
    return best


def _group_sizes(sample: RowSample) -> list[int]:
    """Numbers of values that may share a scale: those of a row, or of one of the usual groups."""
    columns = sample.source.shape[1]
    rows = [columns] if len(sample.source) > 1 else []
    return rows + [size for size in _GROUP_SIZES if size < columns and not columns % size]


def _group_name(sample: RowSample, size: int) -> str:
    return "row" if size == sample.source.shape[1] else f"group of {size}"


def _offset_per_group(sample: RowSample, size: int) -> _Scored | None:
    """The pattern with the spread of the offsets in steps."""
    source, candidate = (rows.reshape(-1, size) for rows in (sample.source, sample.candidate))
    offsets = (candidate - source).mean(1, keepdims=True)
    error = sample.error_of((source + offsets).reshape(sample.source.shape))
    if error > min(sample.limit, _ZERO_POINT_ERROR * sample.error):
        return None
    largest = np.abs(source).max(1, keepdims=True)
    steps = (offsets / np.maximum(largest, 1e-30))[largest > 0]
    sign = np.sign(np.median(steps))
    spread = _relative_spread(np.abs(steps))
    if np.mean(np.sign(steps) == sign) < _SAME_SIGN or spread > _STEADY_STEPS:
        return None
    bits = 4 if abs(np.median(steps)) > 0.03 else 8
    template = (
        f"{{what}} {{are}} {'larger' if sign > 0 else 'smaller'} by one quantization step ({bits} bits) in every "
        f"{_group_name(sample, size)}: writer and reader use different conventions for zero points (GPTQ stores z - 1 "
        "in version 1, z in version 2)"
    )
    evidence = {"group": size, "offset": float(np.median(steps)), "spread": spread, "bits": bits, "error": error}
    return spread, Pattern("quant.zero-point", template, evidence)


def _factors(sample: RowSample, size: int) -> _Scored | None:
    """The pattern with the error that is left."""
    source, candidate = (rows.reshape(-1, size).astype(np.float64) for rows in (sample.source, sample.candidate))
    square = (source**2).sum(1, keepdims=True)
    factors = (source * candidate).sum(1, keepdims=True) / np.maximum(square, 1e-300)
    scaled = (factors * source).reshape(sample.source.shape)
    if not sample.is_explained_by(scaled):
        return None
    error = sample.error_of(scaled)
    largest, factors = np.abs(source).max(1), factors[:, 0]
    if np.mean(np.abs(factors - 1) < max(4 * error / math.sqrt(size), 0.01)) > _LOCAL:
        return None
    id, template = _name_factors(factors, largest, _group_name(sample, size))
    evidence = {
        "group": size,
        "factor_least": float(factors.min()),
        "factor_most": float(factors.max()),
        "error": error,
    }
    return error, Pattern(id, template, evidence)


def _name_factors(factors: Array, largest: Array, group: str) -> tuple[str, str]:
    """The id and the sentence for groups, the largest magnitudes of which are ``largest``, times ``factors``."""
    scales = np.abs(factors) * largest
    if _relative_spread(scales) < _STEADY and _relative_spread(scales) < 0.5 * _relative_spread(largest):
        return (
            "quant.scale-uncalibrated",
            f"{{what}} {{are}} decoded with the same scale in every {group}: the scales were never calibrated, or "
            "never read",
        )
    same_mean = abs(scales.mean() / largest.mean() - 1) < _STEADY
    same_spread = 0.7 < scales.std() / max(largest.std(), 1e-300) < 1.4
    if same_mean and same_spread and np.corrcoef(scales, largest)[0, 1] < _STEADY_STEPS:
        return (
            "quant.scales-permuted",
            f"in {{what}}, every {group} is decoded with the scale of another {group}: the scales are in the wrong "
            "order",
        )
    return (
        "quant.scales-wrong",
        f"in {{what}}, every {group} is multiplied by a different factor, {factors.min():.4g} to {factors.max():.4g}: "
        "the scales are wrong",
    )


def _relative_spread(values: Array) -> float:
    """Standard deviation over mean."""
    mean = float(np.mean(values))
    return float(np.std(values)) / abs(mean) if mean else math.inf
