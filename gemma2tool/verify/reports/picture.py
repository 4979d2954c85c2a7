"""Plots as pictures for places that show no SVG: drawn from the same SVG by resvg."""

from __future__ import annotations

from gemma2tool.errors import UsageError
from gemma2tool.errors.extras import require

FAMILIES = ("DejaVu Sans", "Liberation Sans", "Noto Sans", "Arial", "Helvetica")
"""Fonts for the labels, the first that is installed; resvg leaves text out where it has none."""

ZOOM = 2
"""Pixels of a point: sharp on screens of high density."""


def png(svg: str) -> bytes:
    """The picture of an SVG.

    Raises ``UsageError`` where resvg (``extra.missing``) or a font (``quality.no-font``) is not installed.
    """
    resvg = require("resvg_py", "plot", "--png")

    def drawn(**fonts: object) -> bytes:
        return bytes(resvg.svg_to_bytes(svg_string=svg, zoom=ZOOM, **fonts))

    without_text = drawn(skip_system_fonts=True)
    for family in FAMILIES:
        picture = drawn(sans_serif_family=family, font_family=family)
        if picture != without_text:
            return picture
    raise UsageError(
        "quality.no-font", f"--png needs a font for its labels: none of {', '.join(FAMILIES)} is installed"
    )


def check_png() -> None:
    """Raises what ``png`` would raise."""
    png('<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20"><text y="15">a</text></svg>')
