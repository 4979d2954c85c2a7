"""What a chat template says in Jinja's syntax tree, in every branch, whether a conversation takes it or not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma2tool.pipeline.scan.jinja_constants import Constants, Unknown, walk
from gemma2tool.storage.quoting import quoted

if TYPE_CHECKING:
    from jinja2 import nodes

MAX_NODES = 100_000
MAX_COUNT = 1_000_000
"""Values in a range, or repetitions of a text, beyond which no conversation goes."""

_INTERNAL = re.compile(
    r"__[a-z][a-z0-9_]*__|(?:func|gi|cr|ag|f|tb|co)_(?:globals|code|builtins|frame|back|locals|closure)|mro"
)
_FIELD = re.compile(r"\{[^{}]*\b(__[a-z]\w*__)[^{}]*\}")
"""A field of ``str.format`` that takes such an attribute."""
_OWNERS = frozenset({"lipsum", "cycler", "joiner", "namespace", "range", "dict", "self"})
"""Objects that every template has, from which Python's internals are reached."""
_CODE = frozenset({"eval", "exec", "compile", "open", "__import__", "getattr", "setattr", "globals", "locals", "vars"})
_CALLS = frozenset({"popen", "system", "check_output", "check_call", "import_module", "Popen", "spawn", "execfile"})
_BY_ATTRIBUTE = frozenset({"map", "selectattr", "rejectattr", "sort", "groupby", "sum", "unique", "min", "max"})
"""Filters that take the name of an attribute."""


@dataclass(frozen=True)
class TreeFinding:
    """``id`` of the catalog, what was seen, and the line of the template."""

    id: str
    message: str
    line: int


Judgement = Iterator[tuple[str, str]]
"""Ids of the catalog and what was seen."""


def is_internal(name: str) -> bool:
    """Whether an attribute of this name leads to Python's internals."""
    return _INTERNAL.fullmatch(name) is not None


def tree_findings(tree: nodes.Template) -> Iterator[TreeFinding]:
    """What is dangerous in a parsed template, by line."""
    constants = Constants(tree)
    for count, node in enumerate(walk(tree)):
        if count > MAX_NODES:
            yield TreeFinding("template.endless", f"it has more than {MAX_NODES} nodes", node.lineno)
            return
        for id, message in _judged(node, constants):
            yield TreeFinding(id, message, node.lineno)


def _judged(node: Any, constants: Constants) -> Judgement:
    kind = type(node).__name__
    if kind in ("Import", "FromImport", "Include", "Extends"):
        yield "template.import", f"it has a statement {kind.lower()!r}"
    elif kind == "Name":
        if is_internal(node.name):
            yield "template.internals", f"it uses the name {node.name!r}"
        return
    elif kind in ("Getattr", "Getitem"):
        name = _taken(node, constants)
        on_owner = getattr(node.node, "name", "") in _OWNERS
        if name is not None and (is_internal(name) or (on_owner and name.startswith("_"))):
            yield "template.internals", f"it takes the attribute {quoted(name)}"
    elif kind == "Call":
        yield from _call(node, constants)
    elif kind == "Pow":
        yield "template.endless", "it raises a number to a power"
    elif kind == "Mul" and (count := max(map(constants.number, (node.left, node.right)))) > MAX_COUNT:
        yield "template.endless", f"it multiplies by {count}"
    if kind == "Filter":
        yield from _filter(node, constants)
    yield from _text(node, constants)


def _taken(node: Any, constants: Constants) -> str | None:
    """The name of the attribute or item that an expression takes, where it is constant."""
    return str(node.attr) if hasattr(node, "attr") else constants.text(node.arg)


def _call(node: nodes.Call, constants: Constants) -> Judgement:
    called: Any = node.node
    name = getattr(called, "name", "")
    if name in _CODE - constants.assigned:
        yield "template.internals", f"it calls {name!r}, which no chat template is given"
    if type(called).__name__ in ("Getattr", "Getitem") and (taken := _taken(called, constants)) in _CALLS:
        yield "template.internals", f"it calls {taken!r}"
    count = max((abs(constants.number(argument)) for argument in node.args), default=0)
    if name in ("range", "lipsum") and count > MAX_COUNT:
        yield "template.endless", f"it calls {name}({count})"


def _filter(node: nodes.Filter, constants: Constants) -> Judgement:
    if node.name == "attr":
        name = constants.text(node.args[0]) if node.args else None
        if name is None:
            yield "template.internals", "it takes an attribute whose name it computes"
        elif name.startswith("_") or is_internal(name):
            yield "template.internals", f"it takes the attribute {quoted(name)}"
    elif node.name in _BY_ATTRIBUTE:
        for argument in (*node.args, *(pair.value for pair in node.kwargs)):
            value = constants.text(argument) or ""
            if any(map(is_internal, value.split("."))):
                yield "template.internals", f"it takes the attribute {quoted(value)} with the filter {node.name!r}"
            if node.name == "map" and value == "attr":
                yield "template.internals", "it maps the filter 'attr'"


def _text(node: nodes.Node, constants: Constants) -> Judgement:
    """Names of internals that expressions of constants give, however they are put together."""
    try:
        value = constants.of(node)
    except Unknown:
        return
    for text in [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else ():
        if isinstance(text, str) and text.startswith("__") and is_internal(text):
            yield "template.internals", f"it builds the name {quoted(text)}"
        elif isinstance(text, str) and (formatted := _FIELD.search(text)):
            yield "template.internals", f"it formats the attribute {quoted(formatted[1])}"
