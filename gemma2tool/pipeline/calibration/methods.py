"""What GPTQ and AWQ do at each stage of a Gemma 2 layer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from gemma2tool.model.lazy import FLOAT32, LazyTensor, row_ranges, to_float32
from gemma2tool.pipeline.calibration.layer import DOWN, GATE, KEY, OUTPUT, QUERY, UP, VALUE, CalibratedLayer
from gemma2tool.quantizers.calibration import rounding, scales
from gemma2tool.quantizers.calibration.clipping import Block, blocks, round_clipped
from gemma2tool.quantizers.calibration.grid import Codes, Grid
from gemma2tool.quantizers.calibration.hessian import Hessian, factors
from gemma2tool.quantizers.casts import cast

LEAST_SPREAD = 0.02
"""Standard deviation of the scales' logarithms below which nothing is worth folding."""

ROUNDED_BYTES = 4 << 20
"""Rows rounded at once, as float32."""


class ByHessian:
    """GPTQ: each projection's errors are made up for within its rows, by the inputs that the quantized layers before it give.

    ``grids``: by canonical name. ``damping``, ``act_order``: see ``hessian.factors``.
    """

    def __init__(self, grids: Mapping[str, Grid], *, damping: float, act_order: bool) -> None:
        self.grids, self.damping, self.act_order = grids, damping, act_order

    def attention_input(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._round(layer, hessian, QUERY, KEY, VALUE)

    def attention_output(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._round(layer, hessian, OUTPUT)

    def mlp_input(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._round(layer, hessian, GATE, UP)

    def mlp_output(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._round(layer, hessian, DOWN)

    def _round(self, layer: CalibratedLayer, hessian: Hessian, *names: str) -> None:
        names = [name for name in names if layer.wants(name)]
        if not names:
            return
        columns, found = hessian.columns, factors(hessian, self.damping, self.act_order)
        for name in names:
            weight, grid = layer.projection(name).weight, self.grids[f"{layer.prefix}{name}.weight"]
            ranges = list(row_ranges(weight.rows, 1, rounding.ROWS))

            def piece(span: tuple[int, int], name: str = name, grid: Grid = grid):
                return rounding.round_rows(layer.rows(name, *span), found, grid)

            codes, zeros, steps = (np.concatenate(arrays) for arrays in zip(*layer.run(piece, ranges), strict=True))
            groups = rounding.group_of_column(found, columns, grid.width)
            layer.set_codes(name, Codes(codes, zeros, steps, groups, weight.origin))


class ByScale:
    """AWQ: columns are scaled before they are rounded to nearest, and what feeds them is scaled back; then ranges may be clipped.

    What feeds q, k and v, and gate and up, is a norm applied as 1 + w: its weight becomes (1 + w) / s - 1. What feeds down is up, and o
    is fed by v, whose heads several query heads read: those share their scales. The norms after attention and feed-forward feed the
    residual stream and no projection; they are never touched. A scale is only folded where every projection it meets is quantized.

    ``grids`` and ``norms`` (the types that norms are stored in): by canonical name. One instance serves one layer.
    """

    def __init__(self, grids: Mapping[str, Grid], norms: Mapping[str, np.dtype]) -> None:
        self.grids, self.norms = grids, norms
        self._blocks: dict[str, list[Block]] = {}

    def attention_input(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._norm_fed(layer, "input_layernorm", hessian, QUERY, KEY, VALUE)

    def attention_output(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        config, found = layer.config, None
        hessian.fill()
        if layer.wants(VALUE, OUTPUT) and not config.attention_bias:
            heads = (config.num_key_value_heads, config.num_key_value_groups, config.head_dim)
            shared = hessian.mean_magnitude.view(heads).mean(1, keepdim=True).expand(heads).flatten()
            found = self._search(layer, hessian, shared, OUTPUT)
            if found is not None:
                _scale(layer, VALUE, rows=1 / found.reshape(heads)[:, 0].reshape(-1))
        self._fed(layer, hessian, found, OUTPUT)
        self._round(layer, QUERY, KEY, VALUE, OUTPUT)

    def mlp_input(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._norm_fed(layer, "pre_feedforward_layernorm", hessian, GATE, UP)
        self._round(layer, GATE)

    def mlp_output(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        found = None
        hessian.fill()
        if layer.wants(UP, DOWN):
            found = self._search(layer, hessian, hessian.mean_magnitude, DOWN)
            if found is not None:
                _scale(layer, UP, rows=1 / found)
        self._fed(layer, hessian, found, DOWN)
        self._round(layer, UP, DOWN)

    def _norm_fed(self, layer: CalibratedLayer, norm: str, hessian: Hessian, *names: str) -> None:
        found = wanted = None
        hessian.fill()
        if layer.wants(*names):
            wanted = self._search(layer, hessian, hessian.mean_magnitude, *names)
        if wanted is not None:
            weight = to_float32(layer.tensors[f"{layer.prefix}{norm}.weight"].load())
            stored, found = folded_norm(weight, wanted, self.norms[f"{layer.prefix}{norm}.weight"])
            layer.set_norm(norm, stored)
        self._fed(layer, hessian, found, *names)

    def _fed(self, layer: CalibratedLayer, hessian: Hessian, found: np.ndarray | None, *names: str) -> None:
        """Scale the columns of the projections that have these inputs, and keep what their groups' errors will cost."""
        for name in names:
            if layer.wants(name):
                if found is not None:
                    _scale(layer, name, columns=found)
                self._blocks[name] = blocks(hessian, self._grid(layer, name).width, found)

    def _search(self, layer: CalibratedLayer, hessian: Hessian, magnitude: Tensor, *names: str) -> np.ndarray | None:
        """The best scales, None where they would be hardly any."""
        weights = []
        for name in names:
            picked = scales.sample(layer.projection(name).weight.rows)
            weights.append(np.concatenate([layer.rows(name, row, row + 1) for row in picked]))
        found = scales.search(weights, hessian, magnitude, self._grid(layer, names[0]), layer.run)
        return found if np.log(found).std() >= LEAST_SPREAD else None

    def _round(self, layer: CalibratedLayer, *names: str) -> None:
        for name in names:
            if not layer.wants(name):
                continue
            weight, grid, costs = layer.projection(name).weight, self._grid(layer, name), self._blocks.pop(name)
            ranges = list(row_ranges(weight.rows, weight.row_size * FLOAT32.itemsize, ROUNDED_BYTES))

            def piece(span: tuple[int, int], name: str = name, grid: Grid = grid, costs: list[Block] = costs):
                return round_clipped(layer.rows(name, *span), grid, costs)

            codes, zeros, steps = (np.concatenate(arrays) for arrays in zip(*layer.run(piece, ranges), strict=True))
            groups = np.arange(weight.row_size, dtype=np.int32) // np.int32(grid.width)
            layer.set_codes(name, Codes(codes, zeros, steps, groups, weight.origin))

    def _grid(self, layer: CalibratedLayer, name: str) -> Grid:
        return self.grids[f"{layer.prefix}{name}.weight"]


def folded_norm(weight: np.ndarray, wanted: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """A norm (D,) with the inverse of the ``wanted`` scales in it, as stored in ``dtype``, and the scales that this leaves, float32.

    Stored values of about 0 are coarse where 1 + w is what counts, so the scales follow from what was stored: (1 + w) / (1 + w').
    Channels for which that is no positive number keep their weight.
    """
    one = np.float32(1)
    stored = cast((one + weight) / wanted - one, dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (one + weight) / (one + to_float32(stored))
    kept = ~(np.isfinite(found) & (found > 0))
    stored[kept], found[kept] = cast(weight, dtype)[kept], one
    return stored, found


def _scale(
    layer: CalibratedLayer, name: str, *, rows: np.ndarray | None = None, columns: np.ndarray | None = None
) -> None:
    projection = layer.projection(name)
    projection.weight = _Scaled(projection.weight, rows, columns)


class _Scaled(LazyTensor):
    """A weight (O, I) with its rows (O,) or columns (I,) multiplied."""

    dtype = FLOAT32

    def __init__(self, source: LazyTensor, rows: np.ndarray | None, columns: np.ndarray | None) -> None:
        self.source, self.by_row, self.by_column = source, rows, columns
        self.shape, self.stored, self.origin = source.shape, source.stored, source.origin

    def load_rows(self, first: int, last: int) -> np.ndarray:
        rows = self.source.load_rows_f32(first, last)
        if self.by_row is not None:
            rows = rows * self.by_row[first:last, None]
        return rows if self.by_column is None else rows * self.by_column
