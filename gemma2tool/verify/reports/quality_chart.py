"""KL divergence against size, as SVG: a dot and an interval for each file, a line for each way of making them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gemma2tool.verify.reports import svg
from gemma2tool.verify.reports.markup import Markup, join, tag
from gemma2tool.verify.reports.svg import LogScale, number

LEFT, RIGHT, TOP, BOTTOM = 58, 20, 44, 46

COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56606b")
"""Of the lines, in their order; told apart by color-blind readers."""

STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#24292f} .title{font-weight:600} .soft{fill:#57606a;font-size:11px}"
    " .end{text-anchor:end} .middle{text-anchor:middle} .grid{stroke:#d0d7de} .axis{stroke:#57606a}"
    " polyline{fill:none;stroke-width:2} .interval{stroke-width:1.5} .background{fill:#fff}"
)


@dataclass(frozen=True)
class Dot:
    """A file: ``name``, size in MB (10^6 bytes), KL and its interval."""

    name: str
    megabytes: float
    kl: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """Files made in one way."""

    label: str
    dots: Sequence[Dot]


@dataclass(frozen=True)
class Frame:
    """The size of a drawing, in pixels. ``standalone``: it brings its own colors and background; inside a page, the
    page's style has them.
    """

    width: int = 640
    height: int = 400
    standalone: bool = True

    @property
    def head(self) -> list[Markup]:
        if not self.standalone:
            return []
        background = tag("rect", width=self.width, height=self.height, class_="background")
        return [tag("style", Markup(STYLE)), background]


STANDALONE = Frame()
IN_PAGE = Frame(width=420, height=320, standalone=False)
"""As wide as a phone, so that text keeps its size there."""


def chart(series: Sequence[Series], *, title: str, frame: Frame = STANDALONE) -> Markup | None:
    """The plot with both axes; None where no KL is positive. ``title``: above it."""
    dots = [dot for line in series for dot in line.dots]
    values = [value for dot in dots for value in (dot.kl, dot.low, dot.high)]
    scale = LogScale.around(values, frame.height - BOTTOM, TOP)
    if scale is None:
        return None
    axis = _SizeAxis.around([dot.megabytes for dot in dots], frame)
    parts = [*frame.head, svg.text(LEFT, 18, title, "title"), *_grid(scale, frame), *axis.marks()]
    for line, color in zip(series, _colors(len(series)), strict=True):
        parts.append(_line(line, color, axis, scale))
    return svg.svg(frame.width, frame.height, title, *parts, _legend(series, frame))


def sentence(title: str, text: str, frame: Frame = STANDALONE) -> Markup:
    """What stands in place of a plot that would be empty."""
    frame = Frame(frame.width, 56, frame.standalone)
    texts = svg.text(12, 22, title, "title"), svg.text(12, 42, text, "soft")
    return svg.svg(frame.width, frame.height, title, *frame.head, *texts)


@dataclass(frozen=True)
class _SizeAxis:
    """A linear axis of megabytes."""

    low: float
    high: float
    step: float
    frame: Frame

    @classmethod
    def around(cls, values: Sequence[float], frame: Frame) -> _SizeAxis:
        low, high = min(values), max(values)
        span = max(high - low, 0.1 * high)
        power = 10.0 ** math.floor(math.log10(span / 4))
        step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 6)
        ends = math.floor((low - 0.05 * span) / step) * step, math.ceil((high + 0.05 * span) / step) * step
        return cls(*ends, step, frame)

    def at(self, value: float) -> float:
        return LEFT + (value - self.low) / (self.high - self.low) * (self.frame.width - LEFT - RIGHT)

    def marks(self) -> list[Markup]:
        floor, right = self.frame.height - BOTTOM, self.frame.width - RIGHT
        parts = [svg.line(LEFT, floor, right, floor, "axis")]
        for index in range(round((self.high - self.low) / self.step) + 1):
            value = self.low + index * self.step
            parts.append(svg.text(self.at(value), floor + 16, f"{value:.6g}", "soft middle"))
        return [*parts, svg.text((LEFT + right) / 2, self.frame.height - 10, "size of the file, MB", "soft middle")]


def _colors(count: int) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(count)]


def _grid(scale: LogScale, frame: Frame) -> list[Markup]:
    parts = [svg.text(LEFT, 34, "KL divergence from the source, nats", "soft")]
    for y, label in scale.ticks:
        parts.append(svg.line(LEFT, y, frame.width - RIGHT, y, "grid"))
        parts.append(svg.text(LEFT - 6, y + 4, label, "soft end"))
    return parts


def _line(line: Series, color: str, axis: _SizeAxis, scale: LogScale) -> Markup:
    dots = sorted((dot for dot in line.dots if dot.kl > 0), key=lambda dot: (dot.megabytes, -dot.kl))
    points = [(axis.at(dot.megabytes), scale.at(dot.kl)) for dot in dots]
    path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    parts = [tag("polyline", points=path, stroke=color)] if len(points) > 1 else []
    for dot, (x, y) in zip(dots, points, strict=True):
        top, bottom = scale.at(max(dot.high, scale.low)), scale.at(max(dot.low, scale.low))
        name = f"{dot.name}, {line.label}" if dot.name else line.label
        tooltip = f"{name}: {dot.megabytes:.4g} MB, KL {dot.kl:.3g} ({dot.low:.3g} to {dot.high:.3g})"
        parts.append(
            tag("line", x1=number(x), x2=number(x), y1=number(top), y2=number(bottom), stroke=color, class_="interval")
        )
        parts.append(tag("circle", tag("title", tooltip), cx=number(x), cy=number(y), r=3.5, fill=color))
        parts.append(svg.text(x + 6, y - 5, dot.name, "soft"))
    return join(*parts)


def _legend(series: Sequence[Series], frame: Frame) -> Markup:
    parts = []
    for index, (line, color) in enumerate(zip(series, _colors(len(series)), strict=True)):
        y = TOP + 14 + 16 * index
        width = 7 * len(line.label)
        x = frame.width - RIGHT - width - 22
        parts.append(tag("circle", cx=x, cy=y - 4, r=4, fill=color))
        parts.append(svg.text(x + 10, y, line.label, "soft"))
    return join(*parts)
