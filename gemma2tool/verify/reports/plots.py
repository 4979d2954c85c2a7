"""Plots as SVG that follows the page's colours, light or dark: lines over depth, a histogram, a map of all tensors.

Widths are those of a phone, so that text keeps its size there; on a wide screen the page puts plots side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gemma2tool.verify.compare.measurements import TensorError
from gemma2tool.verify.reports.markup import Markup, join, tag

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 40
LEVELS = 9
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def level(value: float, lowest: float, highest: float) -> int:
    """Which of ``LEVELS`` colours ``value`` gets between two positive values, logarithmically; NaN gets the hottest."""
    if not value > 0:
        return 0 if value == 0 else LEVELS - 1
    share = math.log(value / lowest) / math.log(highest / lowest)
    return min(max(int(share * LEVELS), 0), LEVELS - 1) if math.isfinite(share) else LEVELS - 1


def power(exponent: int) -> str:
    """A power of ten for a label."""
    return {0: "1", 1: "10", 2: "100", -1: "0.1", -2: "0.01"}.get(exponent) or "10" + str(exponent).translate(
        _SUPERSCRIPTS
    )


@dataclass(frozen=True)
class LogScale:
    """Values on a logarithmic axis between two round numbers (1, 2 or 5 times a power of ten), as positions between two ends."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Iterable[float], start: float, end: float) -> LogScale | None:
        """A scale that holds all positive finite ``values``; None where there are none."""
        found = [value for value in values if value > 0 and math.isfinite(value)]
        if not found:
            return None
        low, high = _round_down(min(found)), _round_up(max(found))
        while high / low < 9.9:  # a narrow range would make noise look like much
            low, high = _round_down(low * 0.99), _round_up(high * 1.01)
        return cls(low, high, start, end)

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """(position, label): powers of ten, and where these are few, 2 and 5 times them."""
        first, last = math.floor(math.log10(self.low) + 1e-9), math.ceil(math.log10(self.high) - 1e-9)
        step = max(math.ceil((last - first) / 6), 1)
        factors = (1, 2, 5) if last - first <= 2 else (1,)
        found = []
        for exponent in range(first, last + 1, step):
            for factor in factors:
                value = factor * 10.0**exponent
                if self.low * 0.999 <= value <= self.high * 1.001:
                    found.append((self.at(value), power(exponent) if factor == 1 else f"{value:.3g}"))
        return found


def _round_down(value: float) -> float:
    base = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return next(base * factor for factor in (5, 2, 1) if base * factor <= value * (1 + 1e-9))


def _round_up(value: float) -> float:
    base = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return next(base * factor for factor in (1, 2, 5, 10) if base * factor >= value * (1 - 1e-9))


@dataclass(frozen=True)
class Line:
    """A line of a chart: ``style`` is the class that colours it; values that are zero or not finite leave a gap."""

    label: str
    style: str
    values: Sequence[float]


def lines(series: Sequence[Line], *, x_label: str, about: str) -> Markup | None:
    """Lines over depth 0, 1, ... on a logarithmic axis, with a legend where there are several; None where nothing is above zero."""
    scale = LogScale.around([value for line in series for value in line.values], HEIGHT - BOTTOM, TOP)
    if scale is None:
        return None
    count = max(len(line.values) for line in series)
    step = (WIDTH - LEFT - RIGHT) / max(count - 1, 1)
    parts = [_frame(scale), _depths(count, step, x_label)]
    for line in series:
        places = [
            (LEFT + depth * step, scale.at(value)) if value > 0 and math.isfinite(value) else None
            for depth, value in enumerate(line.values)
        ]
        parts += [_polyline(run, line.style) for run in _runs(places)]
        if count <= 64:
            parts += [
                tag(
                    "circle",
                    tag("title", f"{line.label}, {_depth(depth)}: {value:.3g}"),
                    cx=_n(place[0]),
                    cy=_n(place[1]),
                    r=3,
                    class_=line.style,
                )
                for depth, (place, value) in enumerate(zip(places, line.values, strict=True))
                if place is not None
            ]
    if len(series) > 1:
        parts.append(_legend(series))
    return _svg(WIDTH, HEIGHT, about, *parts)


def histogram(values: np.ndarray, marks: Sequence[tuple[str, float]], *, x_label: str, about: str) -> Markup | None:
    """How often values occur, in bins of equal ratio; zeros are counted in a bin of their own at the left. ``marks``: named
    values to show as lines. None where no value is above zero."""
    finite = values[np.isfinite(values)]
    positive = np.maximum(finite[finite > 0], 1e-12)
    if not positive.size:
        return None
    zeros = int(finite.size - positive.size)
    indent = 26 if zeros else 0
    scale = LogScale.around([float(positive.min()), float(positive.max())], LEFT + indent, WIDTH - RIGHT)
    assert scale is not None
    span = (math.log10(scale.low), math.log10(scale.high))
    counts, edges = np.histogram(np.log10(positive), bins=max(round(4 * (span[1] - span[0])), 12), range=span)
    top = max(int(counts.max()), zeros)
    floor, height = HEIGHT - BOTTOM, HEIGHT - BOTTOM - TOP - 26
    width = (scale.end - scale.start) / len(counts)

    def bar(x: float, count: int, said: str) -> Markup:
        tall = max(count / top * height, 1.0) if count else 0
        return tag(
            "rect",
            tag("title", said),
            x=_n(x + 0.5),
            y=_n(floor - tall),
            width=_n(width - 1),
            height=_n(tall),
            rx=1.5,
            class_="bar",
        )

    parts = [_text(LEFT - 6, floor - height + 4, f"{top:,}", "tick end"), _text(LEFT - 6, floor + 3, "0", "tick end")]
    parts.append(_line(LEFT, floor, WIDTH - RIGHT, floor, "axis"))
    if zeros:
        parts.append(bar(LEFT, zeros, f"{zeros:,} positions at 0"))
        parts.append(_text(LEFT + width / 2, floor + 15, "0", "tick middle"))
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        if count:
            parts.append(
                bar(scale.at(10.0**low), int(count), f"{count:,} positions between {10**low:.2g} and {10**high:.2g}")
            )
    parts += [_text(x, floor + 15, label, "tick middle") for x, label in scale.ticks]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "label middle"))
    taken: list[tuple[float, int]] = []
    for name, value in sorted((mark for mark in marks if mark[1] > 0), key=lambda mark: mark[1]):
        x = scale.at(value)
        parts.append(_line(x, TOP + 22, x, floor, "mark"))
        middle = min(max(x, LEFT + 20), WIDTH - RIGHT - 20)
        beside = {row for other, row in taken if abs(middle - other) < 46}
        row = next(row for row in range(len(marks)) if row not in beside)
        taken.append((middle, row))
        parts.append(_text(middle, TOP + 18 - 12 * row, name, "note middle"))
    return _svg(WIDTH, HEIGHT, about, *parts)


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


def error_range(grid: Mapping[tuple[int | None, str], TensorError]) -> tuple[float, float]:
    """Round numbers around every tensor's RMSE / RMS that is above zero."""
    scale = LogScale.around((each.comparison.relative_rmse for each in grid.values()), 0, 1)
    return (scale.low, scale.high) if scale is not None else (1e-7, 1.0)


def tensor_map(grid: Mapping[tuple[int | None, str], TensorError], span: tuple[float, float], *, about: str) -> Markup:
    """Every tensor as a cell, layers downwards as the model computes them, kinds across; the colour is log10(RMSE / RMS). A dot is a
    tensor equal bit for bit, a frame one that a gate refused."""
    others = sorted({kind for layer, kind in grid if layer is not None} - set(KINDS))
    kinds = [kind for kind in KINDS if any(k == kind for _, k in grid)] + others
    layers = sorted({layer for layer, _ in grid if layer is not None})
    side, tall, head, left = 26, 16 if len(layers) > 16 else 22, 104, 62
    width = left + side * max(len(kinds), 6) + 60
    before = [kind for layer, kind in grid if layer is None and kind == "embed_tokens"]
    after = sorted(kind for layer, kind in grid if layer is None and kind != "embed_tokens")
    y = head
    parts: list[Markup] = []
    for number, kind in enumerate(kinds):
        x = left + side * number + side / 2 + 4
        parts.append(
            tag(
                "text",
                _SHORT.get(kind, kind),
                x=_n(x),
                y=head - 8,
                class_="tick",
                transform=f"rotate(-50 {_n(x)} {head - 8})",
            )
        )

    for kind in before:
        parts += _wide(grid[None, kind], kind, span, left, y, side * len(kinds), tall)
        y += tall + 6
    every = 1 if len(layers) <= 16 else 2 if len(layers) <= 30 else 5
    for row, layer in enumerate(layers):
        if row % every == 0 or row == len(layers) - 1:
            parts.append(_text(left - 8, y + tall / 2 + 4, str(layer), "tick end"))
        for number, kind in enumerate(kinds):
            if (layer, kind) in grid:
                parts.append(_cell(grid[layer, kind], span, left + side * number, y, side, tall))
        y += tall
    y += 6
    for kind in after:
        parts += _wide(grid[None, kind], kind, span, left, y, side * len(kinds), tall)
        y += tall + 4
    return _svg(width, y + 4, about, *parts)


def _wide(
    error: TensorError, kind: str, span: tuple[float, float], left: float, y: float, width: float, tall: float
) -> list[Markup]:
    """A tensor outside the layers, across all columns."""
    label = _text(left - 8, y + tall / 2 + 4, kind.removesuffix("_tokens"), "tick end")
    return [label, _cell(error, span, left, y, width, tall)]


def scale_legend(span: tuple[float, float]) -> Markup:
    """The colours of ``tensor_map``, in words."""
    width, height = 330, 34
    step = 24
    cells = [
        tag("rect", x=_n(60 + number * step), y=2, width=step, height=12, class_=f"h{number}")
        for number in range(LEVELS)
    ]
    end = 60 + step * LEVELS
    return _svg(
        width,
        height,
        "colours from small errors to large ones",
        tag("circle", cx=8, cy=8, r=3, class_="equal"),
        _text(16, 12, "equal", "tick"),
        *cells,
        _text(60, 28, f"{span[0]:.3g}", "tick middle"),
        _text((60 + end) / 2, 28, "RMSE / RMS", "tick middle"),
        _text(end, 28, f"{span[1]:.3g}", "tick middle"),
    )


def _cell(error: TensorError, span: tuple[float, float], x: float, y: float, width: float, tall: float) -> Markup:
    each = error.comparison
    said = f"{each.name}: {each.candidate_type}, RMSE / RMS {each.relative_rmse:.3g}" + (
        f"; {each.message}" if each.message else ""
    )
    title = tag("title", said)
    if each.ok and not each.rmse and not each.max_abs_error:
        return join(
            tag(
                "rect", title, x=_n(x + 1), y=_n(y + 1), width=_n(width - 2), height=_n(tall - 2), rx=2, class_="empty"
            ),
            tag("circle", cx=_n(x + width / 2), cy=_n(y + tall / 2), r=2.5, class_="equal"),
        )
    style = f"h{level(each.relative_rmse, *span)}" + ("" if each.ok else " refused")
    return tag("rect", title, x=_n(x + 1), y=_n(y + 1), width=_n(width - 2), height=_n(tall - 2), rx=2, class_=style)


def _frame(scale: LogScale) -> Markup:
    parts = []
    for y, label in scale.ticks:
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y, "grid"))
        parts.append(_text(LEFT - 6, y + 4, label, "tick end"))
    return join(*parts)


def _depths(count: int, step: float, label: str) -> Markup:
    every = max(math.ceil(count / 10), 1)
    parts = [
        _text(LEFT + depth * step, HEIGHT - BOTTOM + 16, _depth(depth, short=True), "tick middle")
        for depth in range(0, count, every)
    ]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, label, "label middle"))
    return join(*parts)


def _depth(depth: int, short: bool = False) -> str:
    """Depth 0 is the embedding, depth i + 1 what leaves layer i."""
    if depth == 0:
        return "emb" if short else "embedding"
    return str(depth - 1) if short else f"after layer {depth - 1}"


def _legend(series: Sequence[Line]) -> Markup:
    parts, x = [], LEFT + 10
    for line in series:
        parts.append(_line(x, TOP + 6, x + 18, TOP + 6, f"stroke {line.style}"))
        parts.append(_text(x + 23, TOP + 10, line.label, "tick"))
        x += 40 + 7 * len(line.label)
    return join(*parts)


def _runs(places: Sequence[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for place in places:
        if place is None:
            runs.append([])
        else:
            runs[-1].append(place)
    return [run for run in runs if len(run) > 1]


def _polyline(run: Sequence[tuple[float, float]], style: str) -> Markup:
    return tag("polyline", points=" ".join(f"{_n(x)},{_n(y)}" for x, y in run), class_=f"stroke {style}")


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return tag("line", x1=_n(x1), y1=_n(y1), x2=_n(x2), y2=_n(y2), class_=style)


def _text(x: float, y: float, content: str, style: str) -> Markup:
    return tag("text", content, x=_n(x), y=_n(y), class_=style)


def _n(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.1f}".removesuffix(".0")


def _svg(width: float, height: float, about: str, *parts: object) -> Markup:
    return tag(
        "svg",
        tag("title", about),
        *parts,
        viewBox=f"0 0 {_n(width)} {_n(height)}",
        role="img",
        xmlns="http://www.w3.org/2000/svg",
        style=f"max-width: {_n(width * 1.6)}px",
    )
