"""Plots as SVG: lines over depth, and a histogram.

They are as wide as a phone, so that text keeps its size there; on a wide screen the page puts plots side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma2tool.model.lazy import Array
from gemma2tool.verify.reports import svg
from gemma2tool.verify.reports.markup import Markup, join, tag
from gemma2tool.verify.reports.svg import LogScale, number

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 40
"""Margins around the plotting area."""
_MAX_DOTS = 64
"""Depths up to which every point has a dot with a tooltip."""
_LABEL_ROWS = 26
"""Height of the rows of labels above a histogram's bars."""
_LABEL_WIDTH = 46


@dataclass(frozen=True)
class Line:
    """A line of a chart. ``style``: the class that colors it. Values that are zero or not finite leave a gap."""

    label: str
    style: str
    values: Sequence[float]


def lines(series: Sequence[Line], *, x_label: str, title: str) -> Markup | None:
    """Lines over depth 0, 1, ... on a logarithmic axis, with a legend if there are several; None where no value is
    positive."""
    scale = LogScale.around([value for line in series for value in line.values], HEIGHT - BOTTOM, TOP)
    if scale is None:
        return None
    count = max(len(line.values) for line in series)
    step = (WIDTH - LEFT - RIGHT) / max(count - 1, 1)
    parts = [_grid(scale), _depth_axis(count, step, x_label)]
    for line in series:
        points = [
            (LEFT + depth * step, scale.at(value)) if value > 0 and math.isfinite(value) else None
            for depth, value in enumerate(line.values)
        ]
        parts += [_polyline(run, line.style) for run in _runs(points)]
        if count <= _MAX_DOTS:
            parts += _dots(line, points)
    if len(series) > 1:
        parts.append(_legend(series))
    return svg.svg(WIDTH, HEIGHT, title, *parts)


def histogram(values: Array, marks: Sequence[tuple[str, float]], *, x_label: str, title: str) -> Markup | None:
    """How often values occur, in bins of equal ratio; zeros have a bin of their own at the left.

    ``marks``: (name, value) to show as vertical lines. None where no value is positive.
    """
    finite = values[np.isfinite(values)]
    positive = np.maximum(finite[finite > 0], 1e-12)
    if not positive.size:
        return None
    zeros = int(finite.size - positive.size)
    scale = LogScale.around([float(positive.min()), float(positive.max())], LEFT + (26 if zeros else 0), WIDTH - RIGHT)
    assert scale is not None
    span = (math.log10(scale.low), math.log10(scale.high))
    counts, edges = np.histogram(np.log10(positive), bins=max(round(4 * (span[1] - span[0])), 12), range=span)
    bars = _Bars(top=max(int(counts.max()), zeros), width=(scale.end - scale.start) / len(counts))
    parts = [bars.axis()]
    if zeros:
        parts.append(bars.bar(LEFT, zeros, f"{zeros:,} positions at 0"))
        parts.append(svg.text(LEFT + bars.width / 2, bars.floor + 15, "0", "tick middle"))
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        if count:
            tooltip = f"{count:,} positions between {10**low:.2g} and {10**high:.2g}"
            parts.append(bars.bar(scale.at(10.0**low), int(count), tooltip))
    parts += [svg.text(x, bars.floor + 15, label, "tick middle") for x, label in scale.ticks]
    parts.append(svg.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "label middle"))
    parts += _marks([(name, scale.at(value)) for name, value in marks if value > 0], bars.floor)
    return svg.svg(WIDTH, HEIGHT, title, *parts)


@dataclass(frozen=True)
class _Bars:
    """The bars of a histogram. ``top``: the largest count. ``width``: of a bin."""

    top: int
    width: float
    floor: float = HEIGHT - BOTTOM
    height: float = HEIGHT - BOTTOM - TOP - _LABEL_ROWS

    def bar(self, x: float, count: int, tooltip: str) -> Markup:
        height = max(count / self.top * self.height, 1.0) if count else 0
        return tag(
            "rect",
            tag("title", tooltip),
            x=number(x + 0.5),
            y=number(self.floor - height),
            width=number(self.width - 1),
            height=number(height),
            rx=1.5,
            class_="bar",
        )

    def axis(self) -> Markup:
        return join(
            svg.text(LEFT - 6, self.floor - self.height + 4, f"{self.top:,}", "tick end"),
            svg.text(LEFT - 6, self.floor + 3, "0", "tick end"),
            svg.line(LEFT, self.floor, WIDTH - RIGHT, self.floor, "axis"),
        )


def _marks(marks: Sequence[tuple[str, float]], floor: float) -> list[Markup]:
    """Vertical lines at coordinates, with labels in rows so that they do not overlap."""
    parts: list[Markup] = []
    placed: list[tuple[float, int]] = []
    for name, x in sorted(marks, key=lambda mark: mark[1]):
        parts.append(svg.line(x, TOP + 22, x, floor, "mark"))
        middle = min(max(x, LEFT + 20), WIDTH - RIGHT - 20)
        taken = {row for other, row in placed if abs(middle - other) < _LABEL_WIDTH}
        row = next(row for row in range(len(marks)) if row not in taken)
        placed.append((middle, row))
        parts.append(svg.text(middle, TOP + 18 - 12 * row, name, "note middle"))
    return parts


def _grid(scale: LogScale) -> Markup:
    parts = []
    for y, label in scale.ticks:
        parts.append(svg.line(LEFT, y, WIDTH - RIGHT, y, "grid"))
        parts.append(svg.text(LEFT - 6, y + 4, label, "tick end"))
    return join(*parts)


def _depth_axis(count: int, step: float, label: str) -> Markup:
    stride = max(math.ceil(count / 10), 1)
    parts = [
        svg.text(LEFT + depth * step, HEIGHT - BOTTOM + 16, "emb" if depth == 0 else str(depth - 1), "tick middle")
        for depth in range(0, count, stride)
    ]
    parts.append(svg.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, label, "label middle"))
    return join(*parts)


def _depth_name(depth: int) -> str:
    """Depth 0 is the embedding, depth i + 1 the output of layer i."""
    return "embedding" if depth == 0 else f"after layer {depth - 1}"


def _dots(line: Line, points: Sequence[tuple[float, float] | None]) -> list[Markup]:
    return [
        tag(
            "circle",
            tag("title", f"{line.label}, {_depth_name(depth)}: {value:.3g}"),
            cx=number(point[0]),
            cy=number(point[1]),
            r=3,
            class_=line.style,
        )
        for depth, (point, value) in enumerate(zip(points, line.values, strict=True))
        if point is not None
    ]


def _legend(series: Sequence[Line]) -> Markup:
    parts, x = [], LEFT + 10
    for line in series:
        parts.append(svg.line(x, TOP + 6, x + 18, TOP + 6, f"stroke {line.style}"))
        parts.append(svg.text(x + 23, TOP + 10, line.label, "tick"))
        x += 40 + 7 * len(line.label)
    return join(*parts)


def _runs(points: Sequence[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    """The points between gaps, as far as they make a line."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if len(run) > 1]


def _polyline(run: Sequence[tuple[float, float]], style: str) -> Markup:
    return tag("polyline", points=" ".join(f"{number(x)},{number(y)}" for x, y in run), class_=f"stroke {style}")
