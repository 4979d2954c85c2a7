"""The files that a verification is written to for others to read: JUnit XML, a Markdown summary, a page of HTML."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2tool.errors import ResourceError, UsageError
from gemma2tool.storage.paths import refuse_overwriting_input

if TYPE_CHECKING:
    from gemma2tool.model.checkpoint import Checkpoint
    from gemma2tool.verify.reports.markup import Markup
    from gemma2tool.verify.result import Failure, Result

_KINDS = {
    "--junit": r"<\?xml\b[^>]*>\s*<testsuites?\b",
    "--html": r'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta [^>]*Content-Security-Policy',
    "--svg": r'<svg viewBox="[\d. ]+" role="img" xmlns=',
    "--png": "\ufffdPNG\r\n",
    "--markdown": r"\| [^\n]*\n\| -{3}",
    "--bom": r'\{.*"bomFormat"',
    "--sarif": r"\{.*sarif-2\.1\.0",
    "--statement": r"\{.*in-toto\.io/Statement",
    "--summary": "### [\u2705\u274c] ",
}
"""How the files begin that the options write, decoded as UTF-8."""
_BINARY = ("--png",)
_MARKDOWN = (".md", ".markdown")
"""Names of files to which a summary is appended, whatever they say."""
_STEP_SUMMARY = "GITHUB_STEP_SUMMARY"
_HEAD_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """Where reports are written.

    - ``junit``, ``html``: existing reports are replaced.
    - ``summary``: a file to append to.
    - ``bom``: a bill of materials (CycloneDX), made from the receipt; an existing one is replaced.
    """

    junit: Path | None = None
    summary: Path | None = None
    html: Path | None = None
    bom: Path | None = None

    @property
    def by_option(self) -> dict[str, Path]:
        """The requested files, by the command line's options."""
        named = {"--junit": self.junit, "--summary": self.summary, "--html": self.html, "--bom": self.bom}
        return {option: path for option, path in named.items() if path is not None}

    def check(self, others: Iterable[Path], written: Iterable[Path] = ()) -> None:
        """Raise ``UsageError``, before any work, for a report that cannot be written, that would overwrite one of
        ``others``, or whose path is that of one of the files that will be ``written``.
        """
        outputs = {path.absolute(): path for path in written}
        for option, path in self.by_option.items():
            if path.absolute() in outputs:
                message = f"{option} {path}: is where the output goes"
                raise UsageError("report.same", message, hint="name another file")
        check_reports(self.by_option, (*others, *outputs.values()))

    def write(self, results: Sequence[Result], sections: Sequence[Markup] = ()) -> None:
        """Write the requested reports, or none if nothing was verified. ``sections``: sections to add to the page."""
        if results:
            _write(self.by_option, results, sections)

    def write_failure(self, failure: Failure) -> None:
        """Write the requested reports of a run that has no result, replacing those of an earlier run.

        The run may have failed before it checked its reports, so files that are not reports are left as they are.
        """
        _write({option: path for option, path in self.by_option.items() if _may_take(option, path)}, [failure])

    def write_bom(self, receipt: Path | None, model: Checkpoint, source: Path | None = None) -> None:
        """Write the bill of materials of ``receipt``'s output, if one is requested.

        ``model``: the output or its source, which states the license. ``source``: where the source is, if that is known
        from elsewhere than the receipt.
        """
        if self.bom is not None and receipt is not None:
            from gemma2tool.receipt.bom import Origin, Revision, bill, license_of
            from gemma2tool.receipt.document import read_receipt

            revision = None if source is None else Revision.of_snapshot(source)
            replace_report(self.bom, bill(read_receipt(receipt), Origin(license_of(model), revision)))


def _write(named: Mapping[str, Path], results: Sequence[Result], sections: Sequence[Markup] = ()) -> None:
    """Write reports of results, by option."""
    if not named:
        return
    from gemma2tool.verify.reports import junit, markdown, page

    if "--junit" in named:
        replace_report(named["--junit"], junit.junit(results))
    if "--html" in named:
        replace_report(named["--html"], page.html(results, sections))
    if "--summary" in named:
        _append(named["--summary"], markdown.summary(results))


def check_reports(named: Mapping[str, Path], others: Iterable[Path]) -> None:
    """Raises ``UsageError`` for a report, by its option, that cannot be written or would overwrite one of ``others`` or
    a file that is not a report; ``ResourceError`` for one whose folder or file may not be written.
    """
    others = list(others)
    seen: dict[Path, str] = {}
    for option, path in named.items():
        if path.is_dir():
            raise UsageError("report.folder", f"{option} {path}: is a folder", hint="name a file")
        if not path.absolute().parent.is_dir():
            raise UsageError(
                "report.folder", f"{option} {path}: no such folder", hint=f"create it first: mkdir -p {path.parent}"
            )
        if (other := seen.setdefault(path.absolute(), option)) != option:
            raise UsageError("report.same", f"{other} and {option} both name {path}", hint="name two files")
        refuse_overwriting_input(others, path)
        _refuse_special(option, path)
        appended = option == "--summary" and path.exists()
        if not os.access(path if appended else path.absolute().parent, os.W_OK):
            raise ResourceError("report.unwritable", f"{option} {path}: is not writable")
        if not may_be_report(option, path):
            raise UsageError("report.other-file", f"{option} {path}: exists and is not a report of this kind")


def _refuse_special(option: str, path: Path) -> None:
    """Raises ``UsageError`` for what a report can neither replace nor be appended to. A summary may go to a device,
    such as /dev/stdout, and to a file by a link; a pipe that nobody reads would make it wait forever.
    """
    if path.is_symlink() and (option != "--summary" or not path.exists()):
        hint = "remove it, or name the file it points to"
        raise UsageError("output.link", f"{option} {path}: is a symbolic link", hint=hint)
    is_plain = not path.exists() or path.is_file() or (option == "--summary" and path.is_char_device())
    if not is_plain:
        message = f"{option} {path}: is a device or pipe, but a report is a file"
        raise UsageError("output.kind", message, hint="choose a different name")


def may_be_report(option: str, path: Path) -> bool:
    """Whether what is at ``path`` can be what ``option`` wrote earlier: nothing, an empty file, or one that begins like
    its reports. A summary may also be appended to a Markdown file, and to the summary of a CI step.
    """
    if not path.is_file():
        return True  # there is nothing to lose; whoever writes there refuses folders and devices
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    if not head:
        return True
    if b"\0" in head and option not in _BINARY:
        return False
    if option == "--summary" and (path.suffix.lower() in _MARKDOWN or _is_step_summary(path)):
        return True
    kind = _KINDS.get(option)
    return kind is None or re.match(kind, head.decode("utf-8", "replace"), re.DOTALL) is not None


def _may_take(option: str, path: Path) -> bool:
    """Whether a report may be written to ``path``."""
    try:
        _refuse_special(option, path)
    except UsageError:
        return False
    return may_be_report(option, path)


def _is_step_summary(path: Path) -> bool:
    """Whether a file is the summary of the CI step that runs this."""
    summary = os.environ.get(_STEP_SUMMARY, "")
    return bool(summary) and path.absolute() == Path(summary).absolute()


def replace_report(path: Path, content: str | bytes) -> None:
    from gemma2tool.storage.staging.staged_output import Staging

    data = content.encode() if isinstance(content, str) else content
    with Staging(path, force=True, expected_bytes=len(data), folder=False) as staging:
        staging.write_bytes(path.name, data)
        staging.commit()


def _append(path: Path, text: str) -> None:
    """All commands of a CI step share its summary, so it is never replaced."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "ab") as file:
            file.write(text.encode())
    except OSError as error:
        raise ResourceError(
            "report.unwritable", f"{path}: {error.strerror}", hint="name a file that can be written"
        ) from None
