"""Where the results go besides the terminal: a table for a model card, plots, a page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gemma2tool.pipeline.quality.result import VARIANTS, QualityResult
from gemma2tool.pipeline.report_files import check_reports, replace_report
from gemma2tool.verify.reports.document import document
from gemma2tool.verify.reports.markup import Markup, tag
from gemma2tool.verify.reports.picture import check_png, png
from gemma2tool.verify.reports.quality_chart import IN_PAGE, STANDALONE, Dot, Frame, Series, chart, sentence
from gemma2tool.verify.reports.tables import figure, table
from gemma2tool.version import __version__


@dataclass(frozen=True, kw_only=True)
class QualityFiles:
    """The files to write. Existing files are replaced.

    - ``markdown``: the table.
    - ``svg``, ``png``: the plot for the first text.
    - ``html``: the table, and the plots for all texts.
    """

    markdown: Path | None = None
    svg: Path | None = None
    png: Path | None = None
    html: Path | None = None

    @property
    def by_option(self) -> dict[str, Path]:
        named = {"--markdown": self.markdown, "--svg": self.svg, "--png": self.png, "--html": self.html}
        return {option: path for option, path in named.items() if path is not None}

    def check(self, others: Iterable[Path]) -> None:
        """Raise ``UsageError``, before any work, for a file that cannot be written."""
        check_reports(self.by_option, others)
        if self.png is not None:
            check_png()

    def write(self, result: QualityResult) -> None:
        first = plot(result, next(iter(result.texts)))
        if self.markdown is not None:
            replace_report(self.markdown, result.markdown())
        if self.svg is not None:
            replace_report(self.svg, f"{first}\n")
        if self.png is not None:
            replace_report(self.png, png(first))
        if self.html is not None:
            replace_report(self.html, page(result))


def plot(result: QualityResult, label: str, frame: Frame = STANDALONE) -> Markup:
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
    return chart(series, title=title, frame=frame) or sentence(title, "every file computes what the source does", frame)


def page(result: QualityResult) -> str:
    """A self-contained page of HTML without scripts: a plot for each text, and the table."""
    title = f"Quality at a size: {result.source.name}"
    note = result.markdown().rstrip().rsplit("\n", 1)[-1]
    figures = []
    for label, text in result.texts.items():
        caption = f"{text.windows} windows of {text.length} tokens of {text.name}; bars are 95 % intervals."
        figures.append(figure(label, caption, plot(result, label, IN_PAGE)))
    header = tag("header", tag("div", tag("h1", title), tag("p", note, class_="soft")))
    plots = tag("div", *figures, class_="plots")
    part = tag(
        "div",
        tag("h2", "KL divergence against size"),
        plots,
        tag("h2", "Files"),
        table(result.header(), result.rows()),
        class_="part",
    )
    return document(title, tag("main", header, part), tag("footer", f"gemma2tool {__version__}."))
