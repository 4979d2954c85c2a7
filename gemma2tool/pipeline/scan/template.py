"""Chat templates: what their syntax tree says, and what they do when they are rendered.

A chat template is a program that comes with the model. transformers renders it in a sandbox; other programs do not, or
did not (CVE-2024-34359 in llama-cpp-python, CVE-2026-5760 in SGLang).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.conversations import conversations
from gemma2tool.pipeline.scan.finding import ScanFinding
from gemma2tool.pipeline.scan.jinja_constants import Unknown, walk
from gemma2tool.pipeline.scan.jinja_tree import TreeFinding, tree_findings
from gemma2tool.pipeline.scan.text import scan_text
from gemma2tool.pipeline.scan.triggers import triggers
from gemma2tool.pipeline.template import MAX_TEMPLATE_CHARS, MAX_TEXT_CHARS, MEMORY, PYTHON_ERRORS, SECONDS, environment
from gemma2tool.storage import limited_process
from gemma2tool.storage.quoting import quoted

if TYPE_CHECKING:
    from jinja2 import nodes

_MARKUP = re.compile(
    r"<script\b|javascript:|<(?:img|iframe|object|embed)\b[^>]*\bsrc\s*=|!\[[^\]]*\]\(\s*https?:", re.I
)
_MAX_ATTEMPTS = 8


def scan_template(template: str, place: Place, *, located: bool = False) -> Iterator[ScanFinding]:
    """The findings of one chat template. ``located``: it is a whole file, so that its lines are the file's."""
    yield from scan_text(template, place, located=located)
    if len(template) > MAX_TEMPLATE_CHARS:
        yield place.finding("template.endless", f"it has {len(template)} characters; {MAX_TEMPLATE_CHARS} are rendered")
        return
    from jinja2.exceptions import TemplateError

    try:
        tree = environment().parse(template)
    except (TemplateError, *PYTHON_ERRORS) as error:
        yield place.finding(*_invalid(error))
        return
    findings = [*tree_findings(tree), *_triggers(tree), *_markup(tree)]
    for finding in _merged(findings):
        message = finding.message if located else f"{finding.message}, in line {finding.line} of the template"
        yield place.finding(finding.id, message, line=finding.line if located else None)
    ids = {finding.id for finding in findings}
    for id, message in _rendered(template):
        if id not in ids:
            yield place.finding(id, message)


def _invalid(error: Exception) -> tuple[str, str]:
    return "template.syntax", f"{type(error).__name__}: {quoted(str(error))}"


def hostile(template: str) -> ScanFinding | None:
    """The first dangerous finding of a template, if there is one."""
    findings = scan_template(template, Place("chat template"))
    return next((finding for finding in findings if finding.severity == "danger"), None)


def _merged(findings: list[TreeFinding]) -> Iterator[TreeFinding]:
    """One finding for each id, at its first line, which says how many more there are."""
    by_id: dict[str, dict[str, int]] = {}
    for finding in findings:
        by_id.setdefault(finding.id, {}).setdefault(finding.message, finding.line)
    for id, lines in by_id.items():
        message = min(lines, key=lambda message: lines[message])
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        yield TreeFinding(id, f"{message}{more}", lines[message])


def _triggers(tree: nodes.Template) -> Iterator[TreeFinding]:
    try:
        for text, line in triggers(tree):
            yield TreeFinding("template.trigger", f"it looks for {quoted(text)} in what a message says", line)
    except Unknown:
        yield TreeFinding("template.endless", "what it asks of messages takes too long to follow", 1)


def _markup(tree: nodes.Template) -> Iterator[TreeFinding]:
    from jinja2 import nodes

    for node in walk(tree):
        text = node.data if isinstance(node, nodes.TemplateData) else getattr(node, "value", None)
        if isinstance(text, str) and (match := _MARKUP.search(text)):
            yield TreeFinding("template.markup", f"it writes {quoted(match[0])}", node.lineno)


def _rendered(template: str) -> list[tuple[str, str]]:
    """What happens when the template is rendered: as it is on every conversation, and once with every branch taken."""
    if not limited_process.is_available():
        return []
    try:
        answer = limited_process.call(
            lambda: json.dumps(_outcome(template)),
            cpu_seconds=SECONDS,
            memory_bytes=MEMORY,
            answer_bytes=MAX_TEXT_CHARS,
        )
    except limited_process.LimitExceeded:
        limits = f"{SECONDS} seconds or {MEMORY >> 20} MiB of memory"
        return [("template.endless", f"rendering a few short conversations takes more than {limits}")]
    return [(id, message) for id, message in json.loads(answer)]


def _outcome(template: str) -> list[tuple[str, str]]:
    """Whether it can be compiled, and the attributes of Python's internals that renderings ask for.

    Raises ``LimitExceeded`` for too long a text.
    """
    from jinja2.exceptions import TemplateError

    attempts: dict[str, None] = {}
    try:
        programs = [environment(attempts.setdefault).from_string(template)]
    except (TemplateError, *PYTHON_ERRORS) as error:  # a filter that there is not, expressions nested too deeply
        return [_invalid(error)]
    with suppress(TemplateError, *PYTHON_ERRORS):
        programs += _every_branch(template, attempts.setdefault)
    calls_itself = False
    for program in programs:
        for values in conversations({}):
            calls_itself |= _render(program, values) and program is programs[0]
    endless = [("template.endless", "it calls itself without end")] if calls_itself else []
    if not attempts:
        return endless
    return [
        *endless,
        ("template.internals", f"rendered, it reaches for {', '.join(map(repr, list(attempts)[:_MAX_ATTEMPTS]))}"),
    ]


def _render(program: Any, values: Mapping[str, Any]) -> bool:
    """Whether rendering ends in recursion without end."""
    from jinja2.exceptions import TemplateError

    size = 0
    try:
        for piece in program.generate(**values):
            size += len(piece)
            if size > MAX_TEXT_CHARS:
                raise limited_process.LimitExceeded
    except RecursionError:
        return True
    except (TemplateError, *PYTHON_ERRORS):
        pass
    return False


def _every_branch(template: str, watch: Callable[[str], None]) -> list[Any]:
    """The template with the bodies of all branches in a row, and nothing that stops it; none without branches."""
    from jinja2 import ChainableUndefined, nodes

    sandbox = environment(watch)
    sandbox.undefined = ChainableUndefined
    sandbox.globals["raise_exception"] = lambda message: ""
    tree = sandbox.parse(template)
    branches = [node for node in walk(tree) if isinstance(node, nodes.If)]
    for branch in branches:
        others = [node for other in branch.elif_ for node in other.body]
        branch.body, branch.elif_, branch.else_ = [*branch.body, *others, *branch.else_], [], []
        branch.test = nodes.Const(True, lineno=branch.lineno).set_environment(sandbox)
    return [sandbox.from_string(tree)] if branches else []
