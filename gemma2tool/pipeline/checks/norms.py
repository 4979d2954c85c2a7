"""Scales that are off: a 1 too much or missing in norms, scaled embeddings and queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.names import EMBEDDING
from gemma2tool.pipeline.checks.catalog import finding
from gemma2tool.pipeline.checks.finding import CheckFinding
from gemma2tool.pipeline.checks.names import enumerated
from gemma2tool.pipeline.checks.statistics import TensorStatistics

Statistics = Mapping[str, TensorStatistics]
Values = NDArray[np.float64]

NEGATIVE_WEIGHTS = 0.002
"""w starts at 0 and is trained in both directions: in honest files 20 to 70 percent of all values are negative. Where 1
was added to all of them, almost none is."""

NEGATIVE_SCALES = 0.1
"""A scale 1 + w below 0 is rare: 0 to 0.1 percent in honest files. Where 1 was subtracted, half of them are."""

ON_GRID, OFF_GRID = 0.995, 0.5
"""Shares of values that a 16-bit type holds exactly, above which they come from it and below which they do not."""

SHORTEST_ROW, LONGEST_ROW, LARGEST_VALUE = 0.1, 18.0, 1.05
"""Limits of the median length of the embedding's rows, and of their RMS. Multiplied by sqrt(hidden_size) as it enters
the layers, a row is 16 to 68 times as long; honest files have lengths of 0.5 to 7, and random ones an RMS of 1."""


def check_norms(statistics: Statistics) -> Iterator[CheckFinding]:
    norms = {name: tensor.values for name, tensor in statistics.items() if "norm" in name and tensor.values is not None}
    norms = {name: values for name, values in norms.items() if np.isfinite(values).all()}
    constant = [name for name, values in norms.items() if len(values) > 1 and np.ptp(values) == 0]
    if norms and len(constant) == len(norms) and all((norms[name] == 0).all() for name in constant):
        yield finding("norm.untrained", "norms", "every w is 0, where training starts")
        return
    if constant:
        yield finding("norm.constant", enumerated(constant), f"every value is {norms[constant[0]][0]:g}")
    offsets = list(_offsets(norms))
    yield from offsets or _distribution(norms)


# -- one too much, or missing ------------------------------------------------------------------------------------------


def _offsets(norms: Mapping[str, Values]) -> Iterator[CheckFinding]:
    """Exact evidence: values that no 16-bit type holds, and all of them less 1 (or plus 1) are such values.

    It needs norms in float32 of a model in bfloat16 or float16, as in every GGUF.
    """
    plus: list[str] = []
    minus: list[str] = []
    for name, values in norms.items():
        for grid in (ml_dtypes.bfloat16, np.float16):
            if _share_on(grid, values) > OFF_GRID:
                continue
            if any(_share_on(grid, values - one) > ON_GRID for one in (1, 2)):
                plus.append(name)
                break
            # A scale that is stored as such in 16 bits is on the grid too, but then it is positive.
            if _share_on(grid, values + 1) > ON_GRID and np.mean(values < -1) > NEGATIVE_SCALES:
                minus.append(name)
                break
    if plus:
        yield finding(
            "norm.plus-one",
            enumerated(plus),
            "w less 1 is exact in 16 bits in every value, w is not: 1 was added once too often",
            severity="error",
        )
    if minus:
        yield finding(
            "norm.minus-one",
            enumerated(minus),
            "w plus 1 is exact in 16 bits in every value, w is not: 1 was subtracted once too often, or never added",
            severity="error",
        )


def _share_on(grid: type, values: Values) -> float:
    with np.errstate(over="ignore"):
        return float(np.mean(values.astype(np.float32).astype(grid).astype(np.float64) == values))


def _distribution(norms: Mapping[str, Values]) -> Iterator[CheckFinding]:
    """The signs of all norms of the layers together."""
    names = [name for name in norms if ".layers." in name]
    if not names:
        return
    values = np.concatenate([norms[name] for name in names])
    negative, below = float(np.mean(values < 0)), float(np.mean(values < -1))
    if negative < NEGATIVE_WEIGHTS and values.mean() > 0.5:
        yield finding(
            "norm.plus-one",
            f"{len(names)} norms of the layers",
            f"w is {values.mean():.2f} on average and negative in {negative:.2%} of the values, where it is usually"
            " near 0 and of both signs: w + 1 is stored as w, or 1 was added twice",
        )
    if below > NEGATIVE_SCALES:
        yield finding(
            "norm.minus-one",
            f"{len(names)} norms of the layers",
            f"1 + w is below 0 in {below:.0%} of the values, which is rare: 1 was subtracted, or never added",
        )


# -- scales ------------------------------------------------------------------------------------------------------------


def check_scales(statistics: Statistics, config: Gemma2Config) -> Iterator[CheckFinding]:
    embedding = statistics.get(EMBEDDING)
    if embedding is not None and embedding.nonfinite == 0 and embedding.total_square > 0:
        lengths = np.sqrt(embedding.row_squares[embedding.row_squares > 0])
        median = float(np.median(lengths))
        if not SHORTEST_ROW < median < min(LONGEST_ROW, LARGEST_VALUE * config.hidden_size**0.5):
            word = "long: it seems to be multiplied by" if median > 1 else "short: it seems to be divided by"
            yield finding(
                "scale.embedding",
                "embed_tokens",
                f"the median length of its rows is {median:.3g}, unusually {word} sqrt(hidden_size)"
                f" = {config.hidden_size**0.5:.4g}",
            )
    ratios = []
    for layer in range(config.num_hidden_layers):
        q, k = (statistics.get(f"model.layers.{layer}.self_attn.{name}_proj.weight") for name in "qk")
        if q is not None and k is not None and q.rms > 0 and k.rms > 0:
            ratios.append(q.rms / k.rms)
    if not ratios:
        return
    ratio, scale = float(np.median(ratios)), config.head_dim**-0.5
    # Half of the way, on a logarithmic scale, would be sqrt(scale); honest files have 0.5 to 2.
    if ratio < min(2 * scale, 0.4) or ratio > max(0.5 / scale, 2.5):
        yield finding(
            "scale.query",
            "q_proj of all layers",
            f"its RMS is {ratio:.3g} times that of k_proj: the attention scale, {scale:.3g}, seems to be in it",
        )
