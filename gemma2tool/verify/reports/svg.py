"""SVG drawing: elements with short coordinates, colors by level, logarithmic scales. The page's CSS colors
everything."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gemma2tool.verify.reports.markup import Markup, tag

COLOR_LEVELS = 9
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def color_level(value: float, lowest: float, highest: float) -> int:
    """Which of ``COLOR_LEVELS`` colors ``value`` gets between two positive values, logarithmically; NaN gets the
    hottest."""
    if not value > 0:
        return 0 if value == 0 else COLOR_LEVELS - 1
    share = math.log(value / lowest) / math.log(highest / lowest)
    return min(max(int(share * COLOR_LEVELS), 0), COLOR_LEVELS - 1) if math.isfinite(share) else COLOR_LEVELS - 1


def power_of_ten(exponent: int) -> str:
    """A power of ten as a label: "0.01", "10", "10⁻⁶"."""
    short = {0: "1", 1: "10", 2: "100", -1: "0.1", -2: "0.01"}
    return short.get(exponent) or "10" + str(exponent).translate(_SUPERSCRIPTS)


@dataclass(frozen=True)
class LogScale:
    """A logarithmic axis from ``low`` to ``high``, which are 1, 2 or 5 times a power of ten, at the coordinates
    ``start`` and ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Iterable[float], start: float, end: float) -> LogScale | None:
        """A scale that contains all positive finite ``values``; None where there are none."""
        positive = [value for value in values if value > 0 and math.isfinite(value)]
        if not positive:
            return None
        low, high = _round_down(min(positive)), _round_up(max(positive))
        while high / low < 9.9:  # a narrow range would exaggerate noise
            low, high = _round_down(low * 0.99), _round_up(high * 1.01)
        return cls(low, high, start, end)

    def at(self, value: float) -> float:
        """The coordinate of ``value``."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """(coordinate, label) of the powers of ten, and of 2 and 5 times them where these are few."""
        first, last = math.floor(math.log10(self.low) + 1e-9), math.ceil(math.log10(self.high) - 1e-9)
        step = max(math.ceil((last - first) / 6), 1)
        factors = (1, 2, 5) if last - first <= 2 else (1,)
        ticks = []
        for exponent in range(first, last + 1, step):
            for factor in factors:
                value = factor * 10.0**exponent
                if self.low * 0.999 <= value <= self.high * 1.001:
                    ticks.append((self.at(value), power_of_ten(exponent) if factor == 1 else f"{value:.3g}"))
        return ticks


def _round_down(value: float) -> float:
    base = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return next(base * factor for factor in (5, 2, 1) if base * factor <= value * (1 + 1e-9))


def _round_up(value: float) -> float:
    base = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return next(base * factor for factor in (1, 2, 5, 10) if base * factor >= value * (1 - 1e-9))


def number(value: float) -> str:
    """A coordinate with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return tag("line", x1=number(x1), y1=number(y1), x2=number(x2), y2=number(y2), class_=style)


def text(x: float, y: float, content: str, style: str) -> Markup:
    return tag("text", content, x=number(x), y=number(y), class_=style)


def svg(width: float, height: float, title: str, *parts: object) -> Markup:
    """The drawing. ``title``: what it shows, for screen readers."""
    return tag(
        "svg",
        tag("title", title),
        *parts,
        viewBox=f"0 0 {number(width)} {number(height)}",
        role="img",
        xmlns="http://www.w3.org/2000/svg",
        style=f"max-width: {number(width * 1.6)}px",
    )
