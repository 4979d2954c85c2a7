"""Plots of summary.py's tables, as SVG: bars of ratios on a logarithmic axis, and bars of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2tool.verify.reports import svg
from gemma2tool.verify.reports.markup import Markup, tag
from gemma2tool.verify.reports.svg import LogScale, number

if TYPE_CHECKING:
    from summary import Row

WIDTH, LEFT, RIGHT, TOP, STEP = 740, 350, 84, 34, 24
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#24292f} .title{font-weight:600} .soft{fill:#57606a;font-size:11px}"
    " .end{text-anchor:end} .middle{text-anchor:middle} .grid{stroke:#d0d7de} .axis{stroke:#57606a} .bar{fill:#0072b2}"
    " .range{stroke:#24292f;stroke-width:1.5} .background{fill:#fff}"
)


def write(folder: Path, rows: Mapping[str, Sequence[Row]], memory: Sequence[tuple[str, str, float]]) -> None:
    """``benchmarks-commands.svg``, ``-kernels.svg`` and ``-memory.svg``: those that there is something for."""
    titles = {
        "commands": "Commands: the peer's time over gemma2tool's",
        "kernels": "Kernels: gemma2tool's rate over the peer's",
    }
    for name, group in rows.items():
        bars = [(f"{row.name} / {row.peer}", row.median, (min(row.ratios), max(row.ratios))) for row in group]
        (folder / f"benchmarks-{name}.svg").write_text(chart(titles[name], bars, "times") + "\n")
    if memory:
        bars = [(f"{size}: {command}", peak, (peak, peak)) for size, command, peak in memory]
        (folder / "benchmarks-memory.svg").write_text(chart("Peak memory", bars, "MiB") + "\n")


def chart(title: str, bars: Sequence[tuple[str, float, tuple[float, float]]], unit: str) -> Markup:
    """A bar for each (label, value, range), with the value at its end."""
    bottom = TOP + STEP * len(bars)
    scale = LogScale.around([1.0, *(end for _, _, ends in bars for end in ends)], LEFT, WIDTH - RIGHT)
    assert scale is not None
    parts = [tag("style", Markup(STYLE)), tag("rect", width=WIDTH, height=bottom + 30, class_="background")]
    parts.append(svg.text(12, 18, title, "title"))
    for at, label in scale.ticks:
        parts += [svg.line(at, TOP, at, bottom, "grid"), svg.text(at, bottom + 16, label, "soft middle")]
    for index, (label, value, (low, high)) in enumerate(bars):
        middle = TOP + STEP * (index + 0.5)
        start, end = sorted((scale.at(1.0), scale.at(value)))
        parts.append(svg.text(LEFT - 8, middle + 4, label, "end"))
        parts.append(
            tag("rect", x=number(start), y=number(middle - 7), width=number(end - start), height=14, class_="bar")
        )
        if high > low:
            parts.append(svg.line(scale.at(low), middle, scale.at(high), middle, "range"))
        shown = f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
        parts.append(svg.text(max(scale.at(high), end) + 6, middle + 4, shown, "soft"))
    parts.append(svg.line(scale.at(1.0), TOP, scale.at(1.0), bottom, "axis"))
    return svg.svg(WIDTH, bottom + 30, title, *parts)
