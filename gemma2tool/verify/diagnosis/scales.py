"""Factors and offsets that are not known beforehand: of a whole tensor, of its rows, of its quantization groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from gemma2tool.model.config import Gemma2Config
from gemma2tool.verify.diagnosis.names import NORMS, place
from gemma2tool.verify.diagnosis.row_sample import Portion

_GROUPS = (256, 128, 64, 32)
_SAME_SIGN = 0.95  # share of groups that an offset of the zero point moves the same way
_FINER = 0.85  # of the error, what a factor for each row or group may leave to be preferred to one for all
_LOCAL = 0.7  # share of groups that are right, from which on the others are damage in a place
_STEADY, _UNSTEADY = (
    0.12,
    0.5,
)  # relative spread of what should be constant; of an offset in steps, which rounding blurs


@dataclass(frozen=True)
class Pattern:
    """What was found in one tensor: the catalogue's name, a sentence with ``{what}`` (and ``{are}``, ``{have}``), numbers.

    ``otherwise``: what it is instead, if that is what other tensors show.
    """

    id: str
    says: str
    evidence: Mapping[str, float | str] = field(default_factory=dict)
    otherwise: Pattern | None = None


def factors_and_offsets(here: Portion, config: Gemma2Config) -> Pattern | None:
    """The tensor, its rows or its groups times a factor or plus an offset; the finer division only where it explains markedly more."""
    if len(here.source) == 1:
        return _uniform(here, config)
    coarse, fine = _uniform(here, config), _groups(here)
    if coarse is None or fine is None:
        return coarse or fine
    return fine if fine.evidence["error"] < _FINER * coarse.evidence["error"] else coarse


def _uniform(here: Portion, config: Gemma2Config) -> Pattern | None:
    """candidate = factor * source, or, for vectors, source + offset."""
    source, candidate = here.source.astype(np.float64), here.candidate.astype(np.float64)
    square = float(np.mean(source**2))
    factor = float(np.mean(source * candidate)) / square if square else 0.0
    if factor and here.explains(factor * source):
        return _scaled(here, factor, config)
    offset = float(np.mean(candidate - source))
    if len(source) == 1 and here.explains(source + offset):
        return Pattern("tensor.offset", f"{{what}} {{are}} larger by {offset:.6g} everywhere", {"offset": offset})
    if place(here.name).kind in NORMS:
        one = source + 1
        factor = float(np.mean(one * (candidate + 1)) / np.mean(one**2))
        if here.explains(factor * one - 1):
            said = f"{{what}} {{have}} 1 + w {factor:.6g} times the source's: it was multiplied, not w"
            return Pattern("norm.rescaled", said, {"factor": factor})
    return _affine(here)


def _affine(here: Portion) -> Pattern | None:
    """candidate = factor * source + offset."""
    source, candidate = here.source.astype(np.float64), here.candidate.astype(np.float64)
    around = source - source.mean()
    spread = float(np.mean(around**2))
    factor = float(np.mean(around * candidate)) / spread if spread else 0.0
    offset = float(candidate.mean() - factor * source.mean())
    if not factor or not here.explains(factor * source + offset):
        return None
    evidence = {"factor": factor, "offset": offset, "error": here.off(factor * source + offset)}
    return Pattern("tensor.scaled", f"{{what}} {{are}} {factor:.6g} times the source's plus {offset:.6g}", evidence)


def _scaled(here: Portion, factor: float, config: Gemma2Config) -> Pattern:
    evidence = {"factor": factor, "error": here.off(factor * here.source)}
    for word, value in (
        ("query_pre_attn_scalar ** -0.5", config.query_scale),
        ("query_pre_attn_scalar ** 0.5", 1 / config.query_scale),
        ("head_dim ** -0.5", config.head_dim**-0.5),
        ("head_dim ** 0.5", config.head_dim**0.5),
    ):
        if place(here.name).kind == "q_proj" and math.isclose(factor, value, rel_tol=max(here.limit / 4, 1e-3)):
            return Pattern(
                "attention.query-scale-folded",
                f"{{what}} {{are}} multiplied by {word}: the scale of the attention scores is in the file as well as in the config",
                evidence,
            )
    return Pattern("tensor.scaled", f"{{what}} {{are}} {factor:.6g} times the source's", evidence)


def zero_point(here: Portion) -> Pattern | None:
    """Each quantization group, or each row, of a matrix is off by one step."""
    if len(here.source) == 1:
        return None
    found = [pattern for size in _sizes(here) if (pattern := _offset(here, size))]
    return min(found, key=lambda each: each.evidence["spread"], default=None)


def _groups(here: Portion) -> Pattern | None:
    """Each group, or each row, is multiplied by a number of its own."""
    best: Pattern | None = None
    for size in _sizes(here):
        pattern = _factors(here, size)
        if pattern and (best is None or pattern.evidence["error"] < _FINER * best.evidence["error"]):
            best = pattern
    return best


def _sizes(here: Portion) -> list[int]:
    """Values that may share a scale: those of a row, or of one of the usual groups."""
    columns = here.source.shape[1]
    return ([columns] if len(here.source) > 1 else []) + [
        size for size in _GROUPS if size < columns and not columns % size
    ]


def _offset(here: Portion, size: int) -> Pattern | None:
    source, candidate = (each.reshape(-1, size) for each in (here.source, here.candidate))
    apart = candidate - source
    by = apart.mean(1, keepdims=True)
    error = here.off((source + by).reshape(here.source.shape))
    if error > min(here.limit, 0.55 * here.error):
        return None
    largest = np.abs(source).max(1, keepdims=True)
    steps = (by / np.maximum(largest, 1e-30))[largest > 0]
    sign = np.sign(np.median(steps))
    spread = _spread(np.abs(steps))
    if np.mean(np.sign(steps) == sign) < _SAME_SIGN or spread > _UNSTEADY:
        return None
    bits = 4 if abs(np.median(steps)) > 0.03 else 8
    where = "row" if size == here.source.shape[1] else f"group of {size}"
    said = (
        f"{{what}} {{are}} {'larger' if sign > 0 else 'smaller'} by one quantization step ({bits} bits) in every {where}: the zero"
        " point was read by another convention than it was written by (GPTQ stores z - 1 in version 1, z in version 2)"
    )
    evidence = {"group": size, "offset": float(np.median(steps)), "spread": spread, "bits": bits, "error": error}
    return Pattern("quant.zero-point", said, evidence)


def _factors(here: Portion, size: int) -> Pattern | None:
    source, candidate = (each.reshape(-1, size).astype(np.float64) for each in (here.source, here.candidate))
    square = (source**2).sum(1, keepdims=True)
    factor = (source * candidate).sum(1, keepdims=True) / np.maximum(square, 1e-300)
    if not here.explains((factor * source).reshape(here.source.shape)):
        return None
    error = here.off((factor * source).reshape(here.source.shape))
    largest, factor = np.abs(source).max(1), factor[:, 0]
    if np.mean(np.abs(factor - 1) < max(4 * error / math.sqrt(size), 0.01)) > _LOCAL:
        return None
    scale = np.abs(factor) * largest
    evidence = {"group": size, "factor_least": float(factor.min()), "factor_most": float(factor.max()), "error": error}
    each = "row" if size == here.source.shape[1] else f"group of {size}"
    if _spread(scale) < _STEADY and _spread(scale) < 0.5 * _spread(largest):
        said = f"{{what}} {{are}} decoded with the same scale in every {each}: the scales were never calibrated, or never read"
        return Pattern("quant.scale-uncalibrated", said, evidence)
    alike = abs(scale.mean() / largest.mean() - 1) < _STEADY and 0.7 < scale.std() / max(largest.std(), 1e-300) < 1.4
    if alike and np.corrcoef(scale, largest)[0, 1] < _UNSTEADY:
        said = f"in {{what}} every {each} is decoded with the scale of another: the scales are in the wrong order"
        return Pattern("quant.scales-permuted", said, evidence)
    said = f"in {{what}} every {each} is multiplied by a factor of its own, {factor.min():.4g} to {factor.max():.4g}: its scales are wrong"
    return Pattern("quant.scales-wrong", said, evidence)


def _spread(values: np.ndarray) -> float:
    """Standard deviation over mean."""
    mean = float(np.mean(values))
    return float(np.std(values)) / abs(mean) if mean else math.inf
