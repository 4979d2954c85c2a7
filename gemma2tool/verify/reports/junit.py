"""JUnit XML as CI servers read it: a suite per verification, a test case per gate, causes and findings in the failure
text. A run without a result is a suite with an error: otherwise a server would show the report of the run before.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from gemma2tool.storage.paths import workspace_path
from gemma2tool.storage.quoting import one_line
from gemma2tool.verify.finding import GateResult
from gemma2tool.verify.result import Failure, Result, Verification

MAX_FINDINGS = 100


def junit(results: Sequence[Result]) -> str:
    """The document. It contains no times, so that equal results give equal bytes."""
    root = ElementTree.Element("testsuites", name="gemma2tool")
    for result in results:
        root.append(_failed_suite(result) if isinstance(result, Failure) else _suite(result))
    for count in ("tests", "failures", "errors", "skipped"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in root)))
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _suite(verification: Verification) -> ElementTree.Element:
    gates = verification.gates
    suite = ElementTree.Element(
        "testsuite",
        name=one_line(workspace_path(verification.candidate.path)),
        tests=str(len(gates)),
        failures=str(sum(gate.status == "failed" for gate in gates)),
        errors="0",
        skipped=str(sum(gate.status == "skipped" for gate in gates)),
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in (
        ("source", verification.source.path),
        ("source.format", verification.source.format),
        ("candidate.format", verification.candidate.format),
        ("kind", verification.kind),
        ("verdict", verification.verdict),
    ):
        ElementTree.SubElement(properties, "property", name=name, value=one_line(value))
    for gate in gates:
        case = ElementTree.SubElement(suite, "testcase", classname="gemma2tool.verify", name=gate.name)
        if gate.status == "failed":
            failure = ElementTree.SubElement(case, "failure", message=one_line(gate.summary), type=gate.name)
            failure.text = "\n".join(_failure_lines(gate, verification))
        elif gate.status == "skipped":
            ElementTree.SubElement(case, "skipped", message=one_line(gate.summary))
        else:
            ElementTree.SubElement(case, "system-out").text = one_line(gate.summary)
    return suite


def _failed_suite(failure: Failure) -> ElementTree.Element:
    """One test case with an ``<error>``."""
    name = one_line(failure.path or failure.command)
    suite = ElementTree.Element("testsuite", name=name, tests="1", failures="0", errors="1", skipped="0")
    case = ElementTree.SubElement(suite, "testcase", classname=f"gemma2tool.{failure.command}", name=failure.command)
    error = ElementTree.SubElement(case, "error", message=one_line(failure.message), type=failure.id)
    error.text = f"{one_line(failure.hint)} (exit code {failure.exit_code})"
    return suite


def _failure_lines(gate: GateResult, verification: Verification) -> list[str]:
    """The gate's findings; the causes precede those of the first failed gate, where a reader looks first."""
    lines = []
    if gate is next(other for other in verification.gates if other.failed):
        lines += [f"cause [{cause.id}]: {one_line(cause.message)}" for cause in verification.causes]
    lines += [f"{finding.severity}: {one_line(finding.sentence)}" for finding in gate.findings[:MAX_FINDINGS]]
    if len(gate.findings) > MAX_FINDINGS:
        lines.append(f"and {len(gate.findings) - MAX_FINDINGS} more")
    return lines
