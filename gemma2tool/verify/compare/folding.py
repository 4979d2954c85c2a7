"""Scales that a candidate folded away from its columns: the source's tensors as they are under those scales.

AWQ and SmoothQuant multiply the columns of a weight and divide what feeds them. That changes tensors and not the model, provided that
the right tensor was divided. In Gemma 2 that is input_layernorm, applied as 1 + w, for q, k and v; pre_feedforward_layernorm for gate
and up; up for down; v for o, whose scales all query heads of a key-value head share. No other fold keeps the model: the norms after
attention and feed-forward feed the residual stream.

What a norm says (its 1 + w against the source's) is only believed where the columns say the same; both then are compared as products.
"""

from __future__ import annotations

import numpy as np

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import FLOAT32, FLOAT_DTYPES, LazyTensor, row_ranges

NORM_FED = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "pre_feedforward_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
UNSCALED_ROWS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
"""Of those, the ones that feed nothing scales are folded out of: their columns are multiplied by the norm's scales alone."""

ROW_FED = {"mlp.down_proj": "mlp.up_proj", "self_attn.o_proj": "self_attn.v_proj"}
ROW_FOLDING = "awq-4"
"""The type whose makers fold scales into other weights' rows; nothing else says that they did, so each has to be looked at."""

CLOSE, BETTER, FARTHEST = 0.06, 0.5, 0.6
"""Two sets of scales agree if their logarithms differ by no more than CLOSE on the whole (the median: AWQ also clips), FARTHEST anywhere,
and by BETTER of their spread beside that."""

NOISE = 0.02
"""Rounding to 4 bits moves the scale of a whole row by less."""

_ROWS, _CHUNK_VALUES = 1024, 1 << 18


class Scaled(LazyTensor):
    """``source`` (O, I) with its rows (O,) and columns (I,) multiplied, in float32."""

    dtype = FLOAT32

    def __init__(self, source: LazyTensor, rows: np.ndarray | None, columns: np.ndarray | None) -> None:
        self.source, self.by_row, self.by_column = source, rows, columns
        self.shape, self.stored, self.origin = source.shape, source.stored, source.origin

    def load_rows(self, first: int, last: int) -> np.ndarray:
        values = self.source.load_rows_f32(first, last)
        if self.by_row is not None:
            values = values * self.by_row[first:last, None]
        return values if self.by_column is None else values * self.by_column


def folded_source(source: Checkpoint, candidate: Checkpoint) -> dict[str, LazyTensor]:
    """By canonical name, for each tensor that the candidate's folds change: what it must be, given their scales.

    A norm must be what it is; a weight, the source's with rows and columns multiplied. Shapes may differ; such tensors are left alone.
    """
    found: dict[str, LazyTensor] = {}
    for layer in range(min(source.config.num_hidden_layers, candidate.config.num_hidden_layers)):
        pair = _Layer(f"model.layers.{layer}.", source, candidate)
        for norm, fed in NORM_FED.items():
            pair.norm(norm, fed)
        for consumer, producer in ROW_FED.items():
            pair.rows(producer, consumer)
        found |= pair.found()
    return found


class _Layer:
    """One layer of both sides, and the scales found so far."""

    def __init__(self, prefix: str, source: Checkpoint, candidate: Checkpoint) -> None:
        self.prefix, self.config = prefix, source.config
        self.source, self.candidate = source.tensors, candidate.tensors
        self.norms: dict[str, LazyTensor] = {}
        self.by_row: dict[str, np.ndarray] = {}
        self.by_column: dict[str, np.ndarray] = {}

    def found(self) -> dict[str, LazyTensor]:
        weights = self.by_row.keys() | self.by_column.keys()
        return self.norms | {
            name: Scaled(self.source[name], self.by_row.get(name), self.by_column.get(name)) for name in sorted(weights)
        }

    def norm(self, norm: str, fed: tuple[str, ...]) -> None:
        name, weights = f"{self.prefix}{norm}.weight", [f"{self.prefix}{each}.weight" for each in fed]
        if not self._both(name) or not all(self._quantized(each) for each in weights):
            return
        ours, theirs = (
            1 + side[name].load_rows_f32(0, side[name].rows).astype(np.float64)
            for side in (self.source, self.candidate)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            scales = ours / theirs
        scales[(ours == 0) & (theirs == 0)] = 1
        if (ours == theirs).all() or not (np.isfinite(scales) & (scales > 0)).all():
            return
        shown = [f"{self.prefix}{each}.weight" for each in fed if each in UNSCALED_ROWS]
        if _agree(scales, self._column_factors(shown)):
            self.norms[name] = self.candidate[name]
            self.by_column |= dict.fromkeys(weights, scales.astype(np.float32))

    def rows(self, producer: str, consumer: str) -> None:
        made, used = f"{self.prefix}{producer}.weight", f"{self.prefix}{consumer}.weight"
        if not all(self._quantized(name) and self.candidate[name].stored == ROW_FOLDING for name in (made, used)):
            return
        factors = self._row_factors(made)
        if factors is None or np.sqrt(np.mean((factors - 1) ** 2)) <= NOISE:
            return
        row_of = _row_of_column(self.config, self.source[used].row_size, len(factors))
        columns = self._column_factors([used])
        if not _agree(1 / factors[row_of], columns):
            return
        shared = np.bincount(row_of, columns, len(factors)) / np.bincount(row_of, minlength=len(factors))
        scales = np.sqrt(shared / factors).astype(np.float32)
        self.by_row[made], self.by_column[used] = 1 / scales, scales[row_of]

    def _both(self, name: str) -> bool:
        return name in self.source and name in self.candidate and self.source[name].shape == self.candidate[name].shape

    def _quantized(self, name: str) -> bool:
        return self._both(name) and self.candidate[name].stored not in FLOAT_DTYPES

    def _column_factors(self, names: list[str]) -> np.ndarray:
        """What the candidate's columns are multiplied by, (I,) float64, by least squares over some rows of each weight."""
        cross = square = 0.0
        for name in names:
            rows = self.source[name].rows
            for first in np.unique(np.linspace(0, max(rows - 128, 0), _ROWS // 128).astype(int)):
                ours, theirs = (
                    side[name].load_rows_f32(first, min(first + 128, rows)) for side in (self.source, self.candidate)
                )
                cross, square = (
                    cross + (ours * theirs).sum(0, dtype=np.float64),
                    square + (ours**2).sum(0, dtype=np.float64),
                )
        return np.divide(cross, square, out=np.ones(np.shape(cross)), where=square > 0)

    def _row_factors(self, name: str) -> np.ndarray | None:
        """What the candidate's rows are multiplied by beside the scales of its columns, (O,) float64; None where one is not positive."""
        ours, theirs = Scaled(self.source[name], None, self.by_column.get(name)), self.candidate[name]
        found = []
        for first, last in row_ranges(ours.rows, ours.row_size, _CHUNK_VALUES):
            a, b = ours.load_rows(first, last), theirs.load_rows_f32(first, last)
            square = (a * a).sum(1, dtype=np.float64)
            cross = (a * b).sum(1, dtype=np.float64)
            found.append(np.divide(cross, square, out=np.ones(len(a)), where=square > 0))
        factors = np.concatenate(found)
        return factors if (factors > 0).all() else None


def _row_of_column(config: Gemma2Config, columns: int, rows: int) -> np.ndarray:
    """The row of the producer that feeds each column of the consumer: the same one, or that of the key-value head it reads."""
    index = np.arange(columns)
    if columns == rows:
        return index
    head, within = index // config.head_dim, index % config.head_dim
    return head // config.num_key_value_groups * config.head_dim + within


def _agree(said: np.ndarray, seen: np.ndarray) -> bool:
    """Whether the scales that were folded away are those that the columns show."""
    if not (seen > 0).all():
        return False
    apart, spread = np.log(seen / said), np.log(said).std()
    middle = np.median(apart)
    return bool(abs(middle) <= CLOSE and np.abs(apart).max() <= FARTHEST and (apart - middle).std() <= BETTER * spread)
