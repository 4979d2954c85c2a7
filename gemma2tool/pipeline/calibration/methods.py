"""What GPTQ and AWQ do at each stage of a Gemma 2 layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from torch import Tensor

from gemma2tool.model.lazy import FLOAT32, Array, DType, LazyTensor, row_ranges, to_float32
from gemma2tool.pipeline.calibration.layer import DOWN, GATE, KEY, OUTPUT, QUERY, UP, VALUE, CalibratedLayer
from gemma2tool.quantizers.calibration import rounding, scales
from gemma2tool.quantizers.calibration.clipping import HessianBlock, hessian_blocks, quantize_clipped
from gemma2tool.quantizers.calibration.grid import AffineGrid, Grid, RoundedMatrix
from gemma2tool.quantizers.calibration.hessian import Factor, Hessian, inverse_factors
from gemma2tool.quantizers.calibration.row_feedback import round_matrix
from gemma2tool.quantizers.casts import cast

LEAST_SPREAD = 0.02
"""Standard deviation of the scales' logarithms below which they are not worth folding."""

Load = Callable[[int, int], Array]

ROUNDED_BYTES = 4 << 20
"""Rows rounded at once, as float32."""


class ByHessian:
    """GPTQ: each column's rounding error is compensated by the later columns of its row, for the inputs of the
    quantized model. With ``outputs``, also by the later rows (see ``row_feedback``).

    ``grids``: by canonical name. ``damping``, ``act_order``: see ``hessian.inverse_factors``. ``outputs``: factors of
    the rows' inverse Hessians, by canonical name.
    """

    def __init__(
        self,
        grids: Mapping[str, Grid],
        *,
        damping: float,
        act_order: bool,
        outputs: Mapping[str, Sequence[Factor]] = MappingProxyType({}),
    ) -> None:
        self.grids, self.damping, self.act_order, self.outputs = grids, damping, act_order, outputs

    def attention_input(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._round(layer, hessian, QUERY, KEY, VALUE)

    def attention_output(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._round(layer, hessian, OUTPUT)

    def mlp_input(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._round(layer, hessian, GATE, UP)

    def mlp_output(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._round(layer, hessian, DOWN)

    def _round(self, layer: CalibratedLayer, hessian: Hessian, *names: str) -> None:
        quantized = [name for name in names if layer.quantizes(name)]
        if not quantized:
            return
        columns, cholesky = hessian.columns, inverse_factors(hessian, self.damping, self.act_order)
        for name in quantized:
            weight, grid = layer.projection(name).weight, self.grids[f"{layer.prefix}{name}.weight"]
            groups = rounding.group_of_column(cholesky, columns, grid.group_size)
            ranges = list(row_ranges(weight.rows, 1, rounding.ROWS))

            def load(first: int, last: int, name: str = name) -> Array:
                return layer.rows(name, first, last)

            def piece(span: tuple[int, int], load: Load = load, grid: Grid = grid) -> Array:
                return grid.round_rows(load(*span), cholesky)

            outputs = self.outputs.get(f"{layer.prefix}{name}.weight")
            if outputs is None:
                records = np.concatenate(list(layer.run(piece, ranges)))
            else:
                records = round_matrix(load, grid, groups, cholesky, outputs, layer.run)
            layer.set_rounded(name, RoundedMatrix(grid, records, groups, weight.origin))


class ByScale:
    """AWQ: columns are scaled before they are rounded to nearest, their inputs are scaled back, and ranges may be
    clipped.

    The input of q, k and v, and of gate and up, is a norm applied as 1 + w: its weight becomes (1 + w) / s - 1. The
    input of down is up's output, and the input of o is v's, whose heads are shared by several query heads: those share
    their scales. The norms after attention and feed-forward feed the residual stream and no projection; they stay as
    they are. A scale is folded only if every projection it affects is quantized.

    ``grids`` and ``norms`` (the types that norms are stored in): by canonical name. One instance serves one layer.
    """

    def __init__(self, grids: Mapping[str, AffineGrid], norms: Mapping[str, DType]) -> None:
        self.grids, self.norms = grids, norms
        self._blocks: dict[str, list[HessianBlock]] = {}

    def attention_input(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._fold_into_norm(layer, "input_layernorm", hessian, QUERY, KEY, VALUE)

    def attention_output(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        config, column_scales = layer.config, None
        hessian.symmetrize()
        if layer.quantizes(VALUE, OUTPUT) and not config.attention_bias:
            heads = (config.num_key_value_heads, config.num_key_value_groups, config.head_dim)
            shared = hessian.mean_magnitude.view(heads).mean(1, keepdim=True).expand(heads).flatten()
            column_scales = self._search(layer, hessian, shared, OUTPUT)
            if column_scales is not None:
                _scale(layer, VALUE, rows=1 / column_scales.reshape(heads)[:, 0].reshape(-1))
        self._scale_columns(layer, hessian, column_scales, OUTPUT)
        self._round(layer, QUERY, KEY, VALUE, OUTPUT)

    def mlp_input(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._fold_into_norm(layer, "pre_feedforward_layernorm", hessian, GATE, UP)
        self._round(layer, GATE)

    def mlp_output(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        column_scales = None
        hessian.symmetrize()
        if layer.quantizes(UP, DOWN):
            column_scales = self._search(layer, hessian, hessian.mean_magnitude, DOWN)
            if column_scales is not None:
                _scale(layer, UP, rows=1 / column_scales)
        self._scale_columns(layer, hessian, column_scales, DOWN)
        self._round(layer, UP, DOWN)

    def _fold_into_norm(self, layer: CalibratedLayer, norm: str, hessian: Hessian, *names: str) -> None:
        column_scales = best = None
        hessian.symmetrize()
        if layer.quantizes(*names):
            best = self._search(layer, hessian, hessian.mean_magnitude, *names)
        if best is not None:
            weight = to_float32(layer.tensors[f"{layer.prefix}{norm}.weight"].load())
            stored, column_scales = folded_norm(weight, best, self.norms[f"{layer.prefix}{norm}.weight"])
            layer.set_norm(norm, stored)
        self._scale_columns(layer, hessian, column_scales, *names)

    def _scale_columns(
        self, layer: CalibratedLayer, hessian: Hessian, column_scales: Array | None, *names: str
    ) -> None:
        """Scale the columns of the projections that have these inputs, and keep the weights of their groups' errors."""
        for name in names:
            if layer.quantizes(name):
                if column_scales is not None:
                    _scale(layer, name, columns=column_scales)
                self._blocks[name] = hessian_blocks(hessian, self._grid(layer, name).group_size, column_scales)

    def _search(self, layer: CalibratedLayer, hessian: Hessian, magnitude: Tensor, *names: str) -> Array | None:
        """The best scales; None if they hardly differ from one another."""
        weights = []
        for name in names:
            sample = scales.sample_rows(layer.projection(name).weight.rows)
            weights.append(np.concatenate([layer.rows(name, row, row + 1) for row in sample]))
        best: Array = scales.search_scales(weights, hessian, magnitude, self._grid(layer, names[0]), layer.run)
        return best if np.log(best).std() >= LEAST_SPREAD else None

    def _round(self, layer: CalibratedLayer, *names: str) -> None:
        for name in names:
            if not layer.quantizes(name):
                continue
            weight, grid, costs = layer.projection(name).weight, self._grid(layer, name), self._blocks.pop(name)
            ranges = list(row_ranges(weight.rows, weight.row_size * FLOAT32.itemsize, ROUNDED_BYTES))

            def piece(
                span: tuple[int, int], name: str = name, grid: AffineGrid = grid, costs: list[HessianBlock] = costs
            ) -> Array:
                return grid.records(*quantize_clipped(layer.rows(name, *span), grid, costs))

            records = np.concatenate(list(layer.run(piece, ranges)))
            groups = np.arange(weight.row_size, dtype=np.int32) // np.int32(grid.group_size)
            layer.set_rounded(name, RoundedMatrix(grid, records, groups, weight.origin))

    def _grid(self, layer: CalibratedLayer, name: str) -> AffineGrid:
        return self.grids[f"{layer.prefix}{name}.weight"]


def folded_norm(weight: Array, column_scales: Array, dtype: DType) -> tuple[Array, Array]:
    """A norm (D,) with the inverse of ``column_scales`` folded in, as stored in ``dtype``, and the scales that result,
    float32.

    The stored w is rounded, but 1 + w is what is applied, so the scales follow from what was stored: (1 + w) / (1 +
    w'). Channels for which that is not a positive number keep their weight.
    """
    one = np.float32(1)
    stored = cast((one + weight) / column_scales - one, dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        resulting = (one + weight) / (one + to_float32(stored))
    unusable = ~(np.isfinite(resulting) & (resulting > 0))
    stored[unusable], resulting[unusable] = cast(weight, dtype)[unusable], one
    return stored, resulting


def _scale(layer: CalibratedLayer, name: str, *, rows: Array | None = None, columns: Array | None = None) -> None:
    projection = layer.projection(name)
    projection.weight = _Scaled(projection.weight, rows, columns)


class _Scaled(LazyTensor):
    """A weight (O, I) with its rows (O,) or columns (I,) multiplied."""

    dtype = FLOAT32

    def __init__(self, source: LazyTensor, rows: Array | None, columns: Array | None) -> None:
        self.source, self.by_row, self.by_column = source, rows, columns
        self.shape, self.stored, self.origin = source.shape, source.stored, source.origin

    def load_rows(self, first: int, last: int) -> Array:
        rows: Array = self.source.load_rows_f32(first, last)
        if self.by_row is not None:
            rows = rows * self.by_row[first:last, None]
        return rows if self.by_column is None else rows * self.by_column
