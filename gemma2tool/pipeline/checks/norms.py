"""Norms, and scales that belong elsewhere: a 1 too much or missing, norms of another place, scaled embeddings and
queries.

A norm's scale s = 1 + w and the matrix W beside it enter the model only as a product, W diag(s) before a projection and
diag(s) W after one. Gradient flow keeps the difference of their squared norms, channel by channel, so that channels
with a large scale have large columns (or rows) too. In the trained fixture the correlation is 0.7 to 0.9 at the right
place and about 0 at every other; in random weights it is about 0 everywhere. So a norm that follows the matrices of
another place, and not its own, is at the wrong place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gemma2tool.model.config import Gemma2Config
from gemma2tool.pipeline.checks.catalog import finding
from gemma2tool.pipeline.checks.finding import CheckFinding
from gemma2tool.pipeline.checks.names import enumerated
from gemma2tool.pipeline.checks.statistics import TensorStatistics

Statistics = Mapping[str, TensorStatistics]
Values = NDArray[np.float64]

KINDS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "pre_feedforward_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_WRITERS = {"post_attention_layernorm": "self_attn.o_proj", "post_feedforward_layernorm": "mlp.down_proj"}

FOLLOWS = 0.3
"""Correlation above which a norm follows the matrices of a place."""

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


def check_norms(statistics: Statistics, config: Gemma2Config) -> Iterator[CheckFinding]:
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
    yield from _exchanged(statistics, config)


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


# -- norms of another place --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Channel norms (D,) of the matrices beside a norm."""

    channels: Values

    def correlation(self, scale: Values) -> float:
        if np.ptp(scale) == 0 or np.ptp(self.channels) == 0:
            return 0.0
        return float(np.corrcoef(np.abs(scale), self.channels)[0, 1])


def _exchanged(statistics: Statistics, config: Gemma2Config) -> Iterator[CheckFinding]:
    """Compares the order of the norms in the file with every other order, over all layers."""
    tables = []
    for layer in range(config.num_hidden_layers):
        table = _correlations(statistics, f"model.layers.{layer}.")
        if table is not None:
            tables.append(table)
    if not tables:
        return
    mean = np.mean(tables, axis=0)  # [norm, place]
    identity = tuple(range(len(KINDS)))
    best = max(permutations(identity), key=lambda order: sum(mean[kind, order[kind]] for kind in identity))
    moved = [kind for kind in identity if best[kind] != kind]
    if not moved:
        return
    own = float(np.mean([mean[kind, kind] for kind in moved]))
    there = min(float(mean[kind, best[kind]]) for kind in moved)
    if there < FOLLOWS or there - own < FOLLOWS:
        return
    places = "; ".join(f"{KINDS[kind]} belongs to {KINDS[best[kind]]}" for kind in moved)
    torchtune = ""
    if {KINDS[kind] for kind in moved} == {"pre_feedforward_layernorm", "post_feedforward_layernorm"}:
        torchtune = "; torchtune 0.5 and 0.6 exchange these two"
    yield finding(
        "norm.exchanged",
        "norms of the layers",
        f"by their correlation with the matrices ({own:.2f} where they are, at least {there:.2f} there),"
        f" {places}{torchtune}",
    )


def _correlations(statistics: Statistics, prefix: str) -> NDArray[np.float64] | None:
    """(norms, places) of one layer; None where a tensor is missing or not finite."""
    norms = [statistics.get(f"{prefix}{kind}.weight") for kind in KINDS]
    scales = [1 + norm.values for norm in norms if norm is not None and norm.values is not None]
    places = []
    for kind in KINDS:
        if kind in _READERS:
            readers = [statistics.get(f"{prefix}{name}.weight") for name in _READERS[kind]]
            squares = [reader.column_squares for reader in readers if reader is not None]
            if len(squares) < len(readers):
                return None
            places.append(_Place(np.sqrt(sum(squares, np.zeros(1)))))
        else:
            writer = statistics.get(f"{prefix}{_WRITERS[kind]}.weight")
            if writer is None:
                return None
            places.append(_Place(np.sqrt(writer.row_squares)))
    if len(scales) < len(KINDS) or any(len(place.channels) != len(scales[0]) for place in places):
        return None
    table = np.array([[place.correlation(scale) for place in places] for scale in scales])
    return table if np.isfinite(table).all() else None


# -- scales ------------------------------------------------------------------------------------------------------------


def check_scales(statistics: Statistics, config: Gemma2Config) -> Iterator[CheckFinding]:
    embedding = statistics.get("model.embed_tokens.weight")
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
