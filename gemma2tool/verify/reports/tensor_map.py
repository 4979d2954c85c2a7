"""A map of all tensors as SVG: a cell per tensor, layers downwards, kinds across, colored by the tensor's error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemma2tool.verify.compare.measurements import TensorError
from gemma2tool.verify.reports import svg
from gemma2tool.verify.reports.markup import Markup, join, tag
from gemma2tool.verify.reports.svg import COLOR_LEVELS, LogScale, color_level, number

KINDS = (
    "input_layernorm",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "gate_proj",
    "up_proj",
    "down_proj",
    "post_feedforward_layernorm",
)
_SHORT = {
    "input_layernorm": "input norm",
    "post_attention_layernorm": "post-attn norm",
    "pre_feedforward_layernorm": "pre-ffw norm",
    "post_feedforward_layernorm": "post-ffw norm",
}
_CELL_WIDTH, _LEFT, _HEAD = 26, 62, 104
"""Width of a cell, and the space for labels at the left and at the top."""

Grid = Mapping[tuple[int | None, str], TensorError]
"""(layer, kind) -> the tensor's error; layer None: outside the layers."""
ErrorRange = tuple[float, float]


def inexact_kinds(grid: Grid) -> Grid:
    """The tensors of the kinds of which not every one is equal bit for bit."""
    kinds = {kind for (_, kind), error in grid.items() if not _is_equal(error)}
    return {place: error for place, error in grid.items() if place[1] in kinds}


def _is_equal(error: TensorError) -> bool:
    comparison = error.comparison
    return comparison.ok and not comparison.rmse and not comparison.max_abs_error


def error_range(grid: Grid) -> ErrorRange:
    """Round numbers around every positive RMSE / RMS."""
    scale = LogScale.around((error.comparison.relative_rmse for error in grid.values()), 0, 1)
    return (scale.low, scale.high) if scale is not None else (1e-7, 1.0)


def tensor_map(grid: Grid, span: ErrorRange, *, title: str) -> Markup:
    """The map; the color of a cell is the logarithm of RMSE / RMS.

    A dot is a tensor that is equal bit for bit, a frame one that a gate refused.
    """
    kinds = _layer_kinds(grid)
    layers = sorted({layer for layer, _ in grid if layer is not None})
    cells = _Cells(grid, span, 16 if len(layers) > 16 else 22)
    before = [kind for layer, kind in grid if layer is None and kind == "embed_tokens"]
    after = sorted(kind for layer, kind in grid if layer is None and kind != "embed_tokens")
    y: float = _HEAD
    parts = [_column_label(kind, index) for index, kind in enumerate(kinds)]
    for kind in before:
        parts.append(cells.wide(kind, y, len(kinds)))
        y += cells.height + 6
    label_stride = 1 if len(layers) <= 16 else 2 if len(layers) <= 30 else 5
    for row, layer in enumerate(layers):
        if row % label_stride == 0 or row == len(layers) - 1:
            parts.append(svg.text(_LEFT - 8, y + cells.height / 2 + 4, str(layer), "tick end"))
        parts.append(cells.row(layer, kinds, y))
        y += cells.height
    y += 6
    for kind in after:
        parts.append(cells.wide(kind, y, len(kinds)))
        y += cells.height + 4
    return svg.svg(_LEFT + _CELL_WIDTH * max(len(kinds), 6) + 60, y + 4, title, *parts)


def _layer_kinds(grid: Grid) -> list[str]:
    """Kinds in the layers, in the order in which the model computes them."""
    in_layers = {kind for layer, kind in grid if layer is not None}
    all_kinds = {kind for _, kind in grid}
    return [kind for kind in KINDS if kind in all_kinds] + sorted(in_layers - set(KINDS))


def _column_label(kind: str, index: int) -> Markup:
    x, y = _LEFT + _CELL_WIDTH * index + _CELL_WIDTH / 2 + 4, _HEAD - 8
    rotation = f"rotate(-50 {number(x)} {y})"
    return tag("text", _SHORT.get(kind, kind), x=number(x), y=y, class_="tick", transform=rotation)


@dataclass(frozen=True)
class _Cells:
    grid: Grid
    span: ErrorRange
    height: float

    def row(self, layer: int, kinds: Sequence[str], y: float) -> Markup:
        """The cells of a layer."""
        return join(
            *(
                self.cell(self.grid[layer, kind], _LEFT + _CELL_WIDTH * index, y, _CELL_WIDTH)
                for index, kind in enumerate(kinds)
                if (layer, kind) in self.grid
            )
        )

    def wide(self, kind: str, y: float, columns: int) -> Markup:
        """A tensor outside the layers, across all columns."""
        label = svg.text(_LEFT - 8, y + self.height / 2 + 4, kind.removesuffix("_tokens"), "tick end")
        return join(label, self.cell(self.grid[None, kind], _LEFT, y, _CELL_WIDTH * columns))

    def cell(self, error: TensorError, x: float, y: float, width: float) -> Markup:
        comparison = error.comparison
        tooltip = f"{comparison.name}: {comparison.candidate_type}, RMSE / RMS {comparison.relative_rmse:.3g}"
        if comparison.message:
            tooltip += f"; {comparison.message}"
        equal = _is_equal(error)
        heat = f"h{color_level(comparison.relative_rmse, *self.span)}" + ("" if comparison.ok else " refused")
        rectangle = tag(
            "rect",
            tag("title", tooltip),
            x=number(x + 1),
            y=number(y + 1),
            width=number(width - 2),
            height=number(self.height - 2),
            rx=2 if equal else None,
            class_="empty" if equal else heat,
        )
        if not equal:
            return rectangle
        dot = tag("circle", cx=number(x + width / 2), cy=number(y + self.height / 2), r=2.5, class_="equal")
        return join(rectangle, dot)


def scale_legend(span: ErrorRange) -> Markup:
    """The colors of ``tensor_map`` with their values."""
    left, step = 60, 24
    end = left + step * COLOR_LEVELS
    colors = [
        tag("rect", x=number(left + level * step), y=2, width=step, height=12, class_=f"h{level}")
        for level in range(COLOR_LEVELS)
    ]
    return svg.svg(
        330,
        34,
        "colors from small errors to large ones",
        tag("circle", cx=8, cy=8, r=3, class_="equal"),
        svg.text(16, 12, "equal", "tick"),
        *colors,
        svg.text(left, 28, f"{span[0]:.3g}", "tick middle"),
        svg.text((left + end) / 2, 28, "RMSE / RMS", "tick middle"),
        svg.text(end, 28, f"{span[1]:.3g}", "tick middle"),
    )
