"""The options that write a verification down for others: ``--junit``, ``--summary``, ``--html``, ``--card``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma2tool.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from gemma2tool.cli.terminal import Console
    from gemma2tool.verify.result import Verification


@dataclass(frozen=True, kw_only=True)
class Reports:
    """Which reports of a verification to write; the fields are the options, see ``groups``."""

    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="Write the gates as JUnit XML; replaces FILE.")
    ] = None
    summary: Annotated[
        Path | None,
        typer.Option("--summary", metavar="FILE", help="Append a Markdown summary, as for $GITHUB_STEP_SUMMARY."),
    ] = None
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with plots; replaces FILE.")
    ] = None
    card: Annotated[bool, typer.Option("--card", help="Print the table of qualities for a model card.")] = False

    @property
    def _files(self) -> dict[str, Path]:
        named = {"--junit": self.junit, "--summary": self.summary, "--html": self.html}
        return {option: path for option, path in named.items() if path is not None}

    @property
    def asked(self) -> dict[str, object]:
        """The options that were given."""
        return {**self._files, **({"--card": True} if self.card else {})}

    def check(self, kept: Iterable[Path]) -> None:
        """Refuse, before any work, a report that cannot be written or would lie on one of the files ``kept``."""
        from gemma2tool.storage.paths import refuse_same

        kept = list(kept)
        seen: dict[Path, str] = {}
        for option, path in self._files.items():
            if path.is_dir():
                raise UsageError("report.folder", f"{option} {path}: is a folder", hint="name a file")
            if not path.absolute().parent.is_dir():
                raise UsageError("report.folder", f"{option} {path}: no such folder", hint=f"make {path.parent} first")
            if (other := seen.setdefault(path.absolute(), option)) != option:
                raise UsageError("report.same", f"{other} and {option} both name {path}", hint="name two files")
            refuse_same(kept, path)

    def write(self, verifications: Sequence[Verification], console: Console) -> None:
        """Write what was asked for; nothing where nothing was verified."""
        if not verifications or not (self._files or self.card):
            return
        from gemma2tool.verify.reports import junit, markdown, page

        if self.junit is not None:
            _replace(self.junit, junit.junit(verifications))
        if self.html is not None:
            _replace(self.html, page.html(verifications))
        if self.summary is not None:
            _append(self.summary, markdown.summary(verifications))
        if self.card:
            console.markdown(markdown.card(verifications) or _no_card(verifications))


def _no_card(verifications: Sequence[Verification]) -> str:
    if all(each.against_receipt for each in verifications):
        return (
            "A check against a receipt measures no quality, so there is no table: name the source with --reference.\n"
        )
    return "No logits were compared, so there is no table.\n"


def _replace(path: Path, text: str) -> None:
    from gemma2tool.storage.staging.staged_output import Staging

    data = text.encode()
    with Staging(path, force=True, expected_bytes=len(data), folder=False) as staging:
        staging.write_bytes(path.name, data)
        staging.commit()


def _append(path: Path, text: str) -> None:
    """A step's summary is shared by all that run in the step, so nobody may replace it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "ab") as file:
            file.write(text.encode())
    except OSError as error:
        raise ResourceError(
            "report.unwritable", f"{path}: {error.strerror}", hint="name a file that can be written"
        ) from None
