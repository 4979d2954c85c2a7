"""Whether the tensors of a layer belong together, by the norms of the channels that they share.

Two parameters that enter the model only as a product grow together in training: under gradient flow the difference of
their squared norms, channel by channel, does not change. So in a trained model these are correlated:

- a norm's scale 1 + w with the columns of the projections after it, or the rows of the one before it;
- the rows of up_proj (and, less exactly, gate_proj) with the columns of down_proj, neuron by neuron;
- the rows of v_proj with the columns of o_proj, head by head.

In the trained fixture the correlations are 0.45 to 0.95 where tensors belong together and about 0 where they do not; in
random weights all are about 0. Nothing is concluded from a model in which nothing fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from gemma2tool.model.config import Gemma2Config
from gemma2tool.pipeline.checks.catalog import finding
from gemma2tool.pipeline.checks.finding import CheckFinding
from gemma2tool.pipeline.checks.statistics import TensorStatistics
from gemma2tool.pipeline.remarks import number_ranges

Channels = NDArray[np.float64]

FITS, UNFIT = 0.5, 0.1
"""Correlations: of tensors that belong together, at least, and of tensors that do not, at most."""

BETTER = 0.25
"""By how much another arrangement must fit better."""

FOLLOWS = 0.3
"""Correlation above which a norm follows the matrices of a place."""

NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_UP, _GATE, _VALUES = "up_proj and down_proj", "gate_proj and down_proj", "v_proj and o_proj"
_AT_ITS_PLACE = {norm: f"{norm} and its matrices" for norm in NORMS}
_FOLDED = ("awq", "w4a16", "w8a8")
"""Types that tools make after moving scales between the tensors of a pair, which hides whether they fit."""

_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class _Layer:
    """Norms of the channels of one layer: ``scales`` (D,) by norm; ``places`` (D,): of the matrices beside each norm;
    ``gate``, ``up``, ``down`` (F,): of each neuron; ``k``, ``v`` (K, h) and ``o`` (H, h): of each head's channels.
    """

    scales: tuple[Channels, ...]
    places: tuple[Channels, ...]
    gate: Channels
    up: Channels
    down: Channels
    k: Channels
    v: Channels
    o: Channels

    @property
    def groups(self) -> int:
        return len(self.o) // len(self.v)

    def fits(self) -> dict[str, float]:
        """How well the tensors fit each other as they are."""
        own = {
            _AT_ITS_PLACE[norm]: _correlation(scale, place)
            for norm, scale, place in zip(NORMS, self.scales, self.places, strict=True)
        }
        values = _correlation(np.repeat(self.v, self.groups, axis=0), self.o)
        return own | {_UP: _correlation(self.up, self.down), _GATE: _correlation(self.gate, self.down), _VALUES: values}

    def other_arrangements(self) -> dict[tuple[str, str], float]:
        """(pair, mistake) -> how well the pair would fit if the mistake were undone."""
        both = np.concatenate([self.gate, self.up])
        heads, head_dim = self.o.shape
        fast = self.o.reshape(head_dim, heads).T if self.o.size else self.o
        values = np.repeat(self.v, self.groups, axis=0)
        return {
            (_UP, "gate_proj and up_proj were split as halves of rows that alternate"): min(
                _correlation(both[0::2], self.down), _correlation(both[1::2], self.down)
            ),
            (_VALUES, "v_proj and k_proj are exchanged"): _correlation(np.repeat(self.k, self.groups, axis=0), self.o),
            (_VALUES, "query heads are assigned to key-value heads in turn, not in groups"): _correlation(
                np.tile(self.v, (self.groups, 1)), self.o
            ),
            (_VALUES, "heads are the fast axis of o_proj's columns"): _correlation(values, fast),
        }


def check_fit(
    statistics: Mapping[str, TensorStatistics], config: Gemma2Config, *, damaged: bool = False
) -> Iterator[CheckFinding]:
    """``damaged``: other checks have found something. What fits nothing may then be the damaged tensor, so only another
    arrangement that fits better counts.
    """
    layers = [_layer(statistics, config, index) for index in range(config.num_hidden_layers)]
    known = [layer for layer in layers if layer is not None]
    if len(known) < len(layers):
        return  # a tensor is missing or has no finite values, which others report
    exchanged = list(_exchanged(known))
    yield from exchanged
    tables = [layer.fits() for layer in known]
    medians = {pair: float(np.median([table[pair] for table in tables])) for pair in tables[0]}
    rearranged = list(_rearranged(known, medians))
    yield from rearranged
    folded = any(tensor.stored.startswith(_FOLDED) for tensor in statistics.values())
    if not (damaged or folded or exchanged or rearranged):
        yield from _unfit(tables, medians)
        yield from _single_layers(tables, medians)


def _rearranged(layers: list[_Layer], medians: Mapping[str, float]) -> Iterator[CheckFinding]:
    """Pairs that would fit in another arrangement."""
    arrangements = [layer.other_arrangements() for layer in layers]
    others = {key: float(np.median([fits[key] for fits in arrangements])) for key in arrangements[0]}
    for (pair, mistake), fit in others.items():
        own = medians[pair]
        if fit >= FITS and fit - own >= BETTER:
            yield finding(
                "fit.arrangement",
                f"{pair} of all layers",
                f"{mistake}: without that their channels correlate by {fit:.2f}, as they are by {own:.2f}",
            )


def _unfit(tables: list[dict[str, float]], medians: Mapping[str, float]) -> Iterator[CheckFinding]:
    """Pairs that fit in no layer, while the others do."""
    for pair in (_UP, _VALUES):
        others = float(np.median([fit for other, fit in medians.items() if other != pair]))
        largest = max(abs(table[pair]) for table in tables)
        if abs(medians[pair]) < UNFIT and largest < FOLLOWS and others >= FITS:
            yield finding(
                "fit.arrangement",
                f"{pair} of all layers",
                f"their channels do not correlate ({medians[pair]:.2f}), while those of other tensors do"
                f" ({others:.2f}): one of them is transposed, split or ordered differently",
            )


def _single_layers(tables: list[dict[str, float]], medians: Mapping[str, float]) -> Iterator[CheckFinding]:
    for pair, median in medians.items():
        unfit = [layer for layer, table in enumerate(tables) if table[pair] < UNFIT]
        if median >= FITS and unfit and len(unfit) < len(tables) / 2:
            lowest = min(tables[layer][pair] for layer in unfit)
            word = "layers" if len(unfit) > 1 else "layer"
            yield finding(
                "fit.layer",
                f"{pair} of {word} {number_ranges(unfit)}",
                f"they do not fit each other ({lowest:.2f}), as they do in the other layers ({median:.2f}): a tensor of"
                " another layer or model, or one that was never loaded",
            )


def _exchanged(layers: list[_Layer]) -> Iterator[CheckFinding]:
    """Compares the order of the norms in the file with every other order, over all layers."""
    tables = [[[_correlation(scale, place) for place in layer.places] for scale in layer.scales] for layer in layers]
    mean = np.mean(tables, axis=0)  # [norm, place]
    identity = tuple(range(len(NORMS)))
    best = max(permutations(identity), key=lambda order: sum(mean[kind, order[kind]] for kind in identity))
    moved = [kind for kind in identity if best[kind] != kind]
    if not moved:
        return
    own = float(np.mean([mean[kind, kind] for kind in moved]))
    there = min(float(mean[kind, best[kind]]) for kind in moved)
    if there < FOLLOWS or there - own < FOLLOWS:
        return
    places = "; ".join(f"{NORMS[kind]} belongs to {NORMS[best[kind]]}" for kind in moved)
    torchtune = ""
    if {NORMS[kind] for kind in moved} == {"pre_feedforward_layernorm", "post_feedforward_layernorm"}:
        torchtune = "; torchtune 0.5 and 0.6 exchange these two"
    yield finding(
        "norm.exchanged",
        "norms of the layers",
        f"by their correlation with the matrices ({own:.2f} where they are, at least {there:.2f} there),"
        f" {places}{torchtune}",
    )


def _layer(statistics: Mapping[str, TensorStatistics], config: Gemma2Config, index: int) -> _Layer | None:
    prefix = f"model.layers.{index}."
    norms = [statistics.get(f"{prefix}{norm}.weight") for norm in NORMS]
    scales = tuple(1 + norm.values for norm in norms if norm is not None and norm.values is not None)
    parts = {name: statistics.get(f"{prefix}{_module(name)}.{name}_proj.weight") for name in _MATRICES}
    matrices = {name: part for name, part in parts.items() if part is not None and part.nonfinite == 0}
    if len(scales) < len(NORMS) or len(matrices) < len(_MATRICES) or not all(np.isfinite(s).all() for s in scales):
        return None
    rows = {name: np.sqrt(part.row_squares) for name, part in matrices.items()}
    columns = {name: part.column_squares for name, part in matrices.items()}
    head_dim = config.head_dim
    return _Layer(
        scales,
        (
            np.sqrt(columns["q"] + columns["k"] + columns["v"]),
            rows["o"],
            np.sqrt(columns["gate"] + columns["up"]),
            rows["down"],
        ),
        rows["gate"],
        rows["up"],
        np.sqrt(columns["down"]),
        rows["k"].reshape(-1, head_dim),
        rows["v"].reshape(-1, head_dim),
        np.sqrt(columns["o"]).reshape(-1, head_dim),
    )


def _module(name: str) -> str:
    return "self_attn" if len(name) == 1 else "mlp"


def _correlation(one: Channels, other: Channels) -> float:
    """Of the magnitudes; 0 where one of them does not vary."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(np.corrcoef(np.abs(one).reshape(-1), other.reshape(-1))[0, 1])
