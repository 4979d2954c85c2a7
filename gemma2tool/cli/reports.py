"""The options that write a verification as a report: ``--junit``, ``--summary``, ``--html``, ``--card``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma2tool.cli.terminal import Console

if TYPE_CHECKING:
    from gemma2tool.api import ReportFiles
    from gemma2tool.verify.result import Verification

_PANEL = "Reports"


@dataclass(frozen=True, kw_only=True)
class Reports:
    """Which reports of a verification to write; the fields are the options, see ``groups``."""

    junit: Annotated[
        Path | None,
        typer.Option(
            "--junit", metavar="FILE", help="Write the gates as JUnit XML; replaces FILE.", rich_help_panel=_PANEL
        ),
    ] = None
    summary: Annotated[
        Path | None,
        typer.Option(
            "--summary",
            metavar="FILE",
            help="Append a Markdown summary, as for $GITHUB_STEP_SUMMARY.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a page with plots; replaces FILE.", rich_help_panel=_PANEL),
    ] = None
    bom: Annotated[
        Path | None,
        typer.Option(
            "--bom",
            metavar="FILE",
            help="Write a bill of materials (CycloneDX) from the receipt; replaces FILE.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    card: Annotated[
        bool, typer.Option("--card", help="Print the quality table for a model card.", rich_help_panel=_PANEL)
    ] = False

    @property
    def files(self) -> ReportFiles:
        """The reports that are files."""
        from gemma2tool import api

        return api.ReportFiles(junit=self.junit, summary=self.summary, html=self.html, bom=self.bom)

    @property
    def given(self) -> dict[str, object]:
        """The options that were given."""
        return {**self.files.by_option, "--card": self.card}

    def print_card(self, verifications: Sequence[Verification], console: Console) -> None:
        """Print the quality table, if it was requested and something was verified."""
        if not self.card or not verifications:
            return
        from gemma2tool.verify.reports import markdown

        console.markdown(markdown.card(verifications) or _no_card(verifications))


def _no_card(verifications: Sequence[Verification]) -> str:
    if all(verification.against_receipt for verification in verifications):
        return (
            "A check against a receipt measures no quality, so there is no table: name the source with --reference.\n"
        )
    return "No logits were compared, so there is no table.\n"
