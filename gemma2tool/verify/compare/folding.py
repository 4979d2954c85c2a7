"""Scales that a candidate folded into other weights: the source's tensors with these scales applied.

AWQ and SmoothQuant multiply the columns of a weight and divide what feeds it. That changes tensors but not the model,
provided that the right tensor was divided. In Gemma 2 that is input_layernorm, applied as 1 + w, for q, k and v;
pre_feedforward_layernorm for gate and up; up for down; and v for o, where all query heads of a key-value head share the
scales. No other fold preserves the model: the norms after attention and feed-forward feed the residual stream.

The scales that a norm implies (its 1 + w against the source's) are accepted only if the columns of the weights show the
same scales; both are then compared as products.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import FLOAT32, FLOAT_DTYPES, Array, LazyTensor, row_ranges

Floats = NDArray[np.float64]

CONSUMERS_OF_NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "pre_feedforward_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
COLUMN_SCALED_ONLY = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
"""Consumers of norms whose rows are never divided: their columns show the norm's scales alone."""

PRODUCER_OF = {"mlp.down_proj": "mlp.up_proj", "self_attn.o_proj": "self_attn.v_proj"}
"""Consumer -> the weight whose rows are divided by the scales of the consumer's columns."""

ROW_FOLDING_TYPE = "awq-4"
"""The type whose quantizers fold scales into the rows of weights. No metadata says so; each weight has to be examined.
"""

MEDIAN_LIMIT, SPREAD_LIMIT, LARGEST_LIMIT = 0.06, 0.5, 0.6
"""Two sets of scales agree if their log ratios have a median within MEDIAN_LIMIT (AWQ also clips), a standard deviation
of at most SPREAD_LIMIT times that of the log scales, and none is beyond LARGEST_LIMIT."""

ROUNDING_NOISE = 0.02
"""Rounding to 4 bits changes the scale of a whole row by less than this."""

_SAMPLED_ROWS, _SAMPLE_STEP, _CHUNK_VALUES = 1024, 128, 1 << 18


class Scaled(LazyTensor):
    """``source`` (O, I) with its rows multiplied by (O,) and its columns by (I,), in float32."""

    dtype = FLOAT32

    def __init__(
        self,
        source: LazyTensor,
        row_scales: NDArray[np.float32] | None,
        column_scales: NDArray[np.float32] | None,
    ) -> None:
        self.source, self.row_scales, self.column_scales = source, row_scales, column_scales
        self.shape, self.stored, self.origin = source.shape, source.stored, source.origin

    def load_rows(self, first: int, last: int) -> Array:
        values = self.source.load_rows_f32(first, last)
        if self.row_scales is not None:
            values = values * self.row_scales[first:last, None]
        return values if self.column_scales is None else values * self.column_scales


def folded_source(source: Checkpoint, candidate: Checkpoint) -> dict[str, LazyTensor]:
    """The required values, by canonical name, of each tensor that the candidate's folds change.

    The candidate's own values for a norm; for a weight, the source's with rows and columns multiplied. Tensors whose
    shapes differ are left alone.
    """
    tensors: dict[str, LazyTensor] = {}
    for index in range(min(source.config.num_hidden_layers, candidate.config.num_hidden_layers)):
        layer = _Layer(f"model.layers.{index}.", source, candidate)
        for norm, consumers in CONSUMERS_OF_NORMS.items():
            layer.find_norm_fold(norm, consumers)
        for consumer, producer in PRODUCER_OF.items():
            layer.find_row_fold(producer, consumer)
        tensors |= layer.folded()
    return tensors


class _Layer:
    """One layer of both sides, and the scales found in it."""

    def __init__(self, prefix: str, source: Checkpoint, candidate: Checkpoint) -> None:
        self.prefix, self.config = prefix, source.config
        self.source, self.candidate = source.tensors, candidate.tensors
        self.norms: dict[str, LazyTensor] = {}
        self.row_scales: dict[str, NDArray[np.float32]] = {}
        self.column_scales: dict[str, NDArray[np.float32]] = {}

    def folded(self) -> dict[str, LazyTensor]:
        weights = self.row_scales.keys() | self.column_scales.keys()
        return self.norms | {
            name: Scaled(self.source[name], self.row_scales.get(name), self.column_scales.get(name))
            for name in sorted(weights)
        }

    def find_norm_fold(self, norm: str, consumers: Sequence[str]) -> None:
        name, weights = f"{self.prefix}{norm}.weight", [f"{self.prefix}{consumer}.weight" for consumer in consumers]
        if not self._has_both(name) or not all(self._is_quantized(weight) for weight in weights):
            return
        source_norm, candidate_norm = (
            1 + tensors[name].load_rows_f32(0, tensors[name].rows).astype(np.float64)
            for tensors in (self.source, self.candidate)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            scales = source_norm / candidate_norm
        scales[(source_norm == 0) & (candidate_norm == 0)] = 1
        if (source_norm == candidate_norm).all() or not (np.isfinite(scales) & (scales > 0)).all():
            return
        evidence = [f"{self.prefix}{consumer}.weight" for consumer in consumers if consumer in COLUMN_SCALED_ONLY]
        if _agree(scales, self._column_factors(evidence)):
            self.norms[name] = self.candidate[name]
            self.column_scales |= dict.fromkeys(weights, scales.astype(np.float32))

    def find_row_fold(self, producer: str, consumer: str) -> None:
        producer, consumer = f"{self.prefix}{producer}.weight", f"{self.prefix}{consumer}.weight"
        for name in (producer, consumer):
            if not self._is_quantized(name) or self.candidate[name].stored != ROW_FOLDING_TYPE:
                return
        factors = self._row_factors(producer)
        if factors is None or np.sqrt(np.mean((factors - 1) ** 2)) <= ROUNDING_NOISE:
            return
        row_of = _row_of_column(self.config, self.source[consumer].row_size, len(factors))
        columns = self._column_factors([consumer])
        if not _agree(1 / factors[row_of], columns):
            return
        shared = np.bincount(row_of, columns, len(factors)) / np.bincount(row_of, minlength=len(factors))
        scales = np.sqrt(shared / factors).astype(np.float32)
        self.row_scales[producer], self.column_scales[consumer] = np.float32(1) / scales, scales[row_of]

    def _has_both(self, name: str) -> bool:
        return name in self.source and name in self.candidate and self.source[name].shape == self.candidate[name].shape

    def _is_quantized(self, name: str) -> bool:
        return self._has_both(name) and self.candidate[name].stored not in FLOAT_DTYPES

    def _column_factors(self, names: Sequence[str]) -> Floats:
        """The factors of the candidate's columns (I,), by least squares over some rows of each weight."""
        cross: Floats | float = 0.0
        square: Floats | float = 0.0
        for name in names:
            rows = self.source[name].rows
            starts = np.linspace(0, max(rows - _SAMPLE_STEP, 0), _SAMPLED_ROWS // _SAMPLE_STEP).astype(int)
            for first in np.unique(starts):
                last = min(first + _SAMPLE_STEP, rows)
                source, candidate = (
                    tensors[name].load_rows_f32(first, last) for tensors in (self.source, self.candidate)
                )
                cross = cross + (source * candidate).sum(0, dtype=np.float64)
                square = square + (source**2).sum(0, dtype=np.float64)
        return np.divide(cross, square, out=np.ones(np.shape(cross)), where=np.greater(square, 0))

    def _row_factors(self, name: str) -> Floats | None:
        """The factors of the candidate's rows (O,) besides the scales of its columns; None if one is not positive."""
        source, candidate = Scaled(self.source[name], None, self.column_scales.get(name)), self.candidate[name]
        parts = []
        for first, last in row_ranges(source.rows, source.row_size, _CHUNK_VALUES):
            source_rows, candidate_rows = source.load_rows(first, last), candidate.load_rows_f32(first, last)
            square = (source_rows * source_rows).sum(1, dtype=np.float64)
            cross = (source_rows * candidate_rows).sum(1, dtype=np.float64)
            parts.append(np.divide(cross, square, out=np.ones(len(cross)), where=square > 0))
        factors = np.concatenate(parts)
        return factors if (factors > 0).all() else None


def _row_of_column(config: Gemma2Config, columns: int, rows: int) -> NDArray[np.int64]:
    """The row of the producer that feeds each column of the consumer: the same one, or that of its key-value head."""
    index = np.arange(columns)
    if columns == rows:
        return index
    head, within = index // config.head_dim, index % config.head_dim
    return head // config.num_key_value_groups * config.head_dim + within


def _agree(folded: Floats, observed: Floats) -> bool:
    """Whether the scales that were folded away are those that the columns show."""
    if not (observed > 0).all():
        return False
    log_ratio, spread = np.log(observed / folded), np.log(folded).std()
    median = np.median(log_ratio)
    return bool(
        abs(median) <= MEDIAN_LIMIT
        and np.abs(log_ratio).max() <= LARGEST_LIMIT
        and (log_ratio - median).std() <= SPREAD_LIMIT * spread
    )
