"""Reports of a run that ended without a result: it was refused, it lacked something, it was interrupted.

Without them, the reports of the run before would stay in place, and a CI server would show these.
"""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree import ElementTree

from gemma2tool.storage.paths import workspace_path
from gemma2tool.storage.quoting import one_line
from gemma2tool.verify.reports.junit import encoded
from gemma2tool.verify.reports.markdown import escaped
from gemma2tool.verify.reports.markup import tag
from gemma2tool.verify.reports.page import document
from gemma2tool.version import __version__


@dataclass(frozen=True)
class Failure:
    """Why a run has no result. ``command``: what was run; ``subject``: the file that it was about, or empty."""

    command: str
    subject: str
    id: str
    message: str
    hint: str
    exit_code: int

    @property
    def path(self) -> str:
        """The subject, relative to the workspace."""
        return workspace_path(self.subject) if self.subject else ""


def junit(failure: Failure) -> str:
    """One test case with an ``<error>``."""
    root = ElementTree.Element("testsuites", name="gemma2tool")
    suite = ElementTree.SubElement(root, "testsuite", name=one_line(failure.path or failure.command))
    for element in (root, suite):
        for count, value in (("tests", "1"), ("failures", "0"), ("errors", "1"), ("skipped", "0")):
            element.set(count, value)
    case = ElementTree.SubElement(suite, "testcase", classname=f"gemma2tool.{failure.command}", name=failure.command)
    error = ElementTree.SubElement(case, "error", message=one_line(failure.message), type=failure.id)
    error.text = f"{one_line(failure.hint)} (exit code {failure.exit_code})"
    return encoded(root)


def summary(failure: Failure) -> str:
    """A section that says what happened."""
    subject = f": {escaped(failure.path)}" if failure.subject else ""
    lines = [f"### \u274c {escaped(failure.command)} has no result{subject}", ""]
    lines += [f"> **{escaped(failure.message)}** ({escaped(failure.id)}, exit code {failure.exit_code})"]
    lines += [">", f"> {escaped(failure.hint)}"] if failure.hint else []
    return "\n".join([*lines, ""])


def html(failure: Failure) -> str:
    """A page that says what happened."""
    lines = [
        tag("h1", tag("b", "No result: "), f"{failure.command} ended with exit code {failure.exit_code}"),
        tag("p", tag("span", failure.path, class_="path")),
        tag("p", f"{failure.message} [{failure.id}]"),
        tag("p", failure.hint, class_="soft"),
    ]
    header = tag("header", tag("div", *lines), class_="failed")
    return document(
        f"NO RESULT: {failure.path or failure.command}", header, tag("footer", f"gemma2tool {__version__}.")
    )
