"""Where the results go besides the terminal: a table for a model card, plots, a page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gemma2tool.pipeline.quality.result import VARIANTS, QualityResult
from gemma2tool.pipeline.report_files import check_reports, replace_report
from gemma2tool.verify.reports.markup import Markup, tag
from gemma2tool.verify.reports.picture import check_png, png
from gemma2tool.verify.reports.quality_chart import Dot, Series, chart, sentence


@dataclass(frozen=True, kw_only=True)
class QualityFiles:
    """``markdown``: the table. ``svg``, ``png``: the plot of the first text. ``html``: the table and the plots of all
    texts. Existing files are replaced."""

    markdown: Path | None = None
    svg: Path | None = None
    png: Path | None = None
    html: Path | None = None

    @property
    def by_option(self) -> dict[str, Path]:
        named = {"--markdown": self.markdown, "--svg": self.svg, "--png": self.png, "--html": self.html}
        return {option: path for option, path in named.items() if path is not None}

    def check(self, others: Iterable[Path]) -> None:
        """Raises ``UsageError`` for a file that cannot be written, before any work."""
        check_reports(self.by_option, others)
        if self.png is not None:
            check_png()

    def write(self, result: QualityResult) -> None:
        plots = [plot(result, label) for label in result.texts]
        if self.markdown is not None:
            replace_report(self.markdown, result.markdown())
        if self.svg is not None:
            replace_report(self.svg, f"{plots[0]}\n")
        if self.png is not None:
            replace_report(self.png, png(plots[0]))
        if self.html is not None:
            replace_report(self.html, page(result, plots))


def plot(result: QualityResult, label: str) -> Markup:
    """KL on a text against size."""
    series = []
    for variant, called in VARIANTS.items():
        points = [point for point in result.points if point.variant == variant]
        dots = [
            Dot(point.name, point.nbytes / 1e6, *(getattr(point.kl[label], name) for name in ("mean", "low", "high")))
            for point in points
        ]
        if dots:
            series.append(Series(called, dots))
    title = f"{result.source.name}: {label}"
    return chart(series, title=title) or sentence(title, "every file computes what the source does")


def page(result: QualityResult, plots: Iterable[Markup]) -> str:
    """A self-contained page of HTML without scripts."""
    header, rows = result.header(), result.rows()
    table = tag(
        "table",
        tag("tr", *(tag("th", column.removesuffix("#")) for column in header)),
        *(tag("tr", *(tag("td", cell) for cell in row)) for row in rows),
    )
    style = "body{font:15px system-ui,sans-serif;margin:2rem;max-width:70rem} td,th{padding:.2rem .8rem}"
    note = result.markdown().rstrip().rsplit("\n", 1)[-1]
    title = f"Quality at a size: {result.source.name}"
    body = tag("body", tag("h1", title), *plots, table, tag("p", note))
    head = tag("head", tag("meta", charset="utf-8"), tag("title", title), tag("style", Markup(style)))
    return f'<!doctype html>\n<html lang="en">{head}{body}</html>\n'
