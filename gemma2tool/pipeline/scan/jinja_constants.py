"""Expressions of constants in a chat template, evaluated: names of attributes are often put together so that a search
for them fails.

Only the methods and filters of texts are known here, within limits of size. Nothing of the template is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import nodes

MAX_SIZE = 10_000
_MAX_DEPTH = 50

_TEXT_METHODS = frozenset(
    {
        *("lower", "upper", "title", "capitalize", "casefold", "swapcase", "strip", "lstrip", "rstrip"),
        *("replace", "join", "format", "removeprefix", "removesuffix", "split"),
    }
)
_WIDTH = re.compile(r"%[^%a-zA-Z(]*[\d*]")
"""A width or precision, with which a short pattern gives a very long text."""
_PLAIN_FIELD = re.compile(r"\w*(?:![sra])?(?::?[sdcx])?")


def walk(tree: nodes.Node) -> Iterator[nodes.Node]:
    """All nodes below ``tree``, in the order of the text. No recursion: a long sum is a tree as deep as it is long."""
    rest = list(tree.iter_child_nodes())[::-1]
    while rest:
        node = rest.pop()
        yield node
        rest += list(node.iter_child_nodes())[::-1]


class Unknown(Exception):
    """An expression that is not of constants, or gives too much."""


class Constants:
    """Evaluates expressions of constants. ``assigned``: names that the template gives a value itself."""

    def __init__(self, tree: nodes.Template) -> None:
        from jinja2 import nodes

        self.values: dict[str, Any] = {}
        assigned: set[str] = set()
        once: dict[str, nodes.Node | None] = {}
        for node in walk(tree):
            if isinstance(node, nodes.Macro) or (isinstance(node, nodes.Name) and node.ctx in ("store", "param")):
                assigned.add(node.name)
            elif isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
                once[node.target.name] = None if node.target.name in once else node.node
        self.assigned = frozenset(assigned)
        for name, expression in once.items():
            try:
                if expression is not None:
                    self.values[name] = self.of(expression)
            except Unknown:
                continue

    def of(self, node: nodes.Node, depth: int = 0) -> Any:
        """The value of an expression. Raises ``Unknown``."""
        evaluate = _EVALUATORS.get(type(node).__name__)
        if evaluate is None or depth > _MAX_DEPTH:
            raise Unknown
        try:
            value = evaluate(self, node, depth + 1)
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, StopIteration) as error:
            raise Unknown from error
        if isinstance(value, (str, list, tuple, dict)) and len(value) > MAX_SIZE:
            raise Unknown
        return value

    def text(self, node: nodes.Node | None) -> str | None:
        """The value if it is a text."""
        try:
            value = None if node is None else self.of(node)
        except Unknown:
            return None
        return value if isinstance(value, str) else None

    def number(self, node: nodes.Node) -> int:
        """The value if it is an integer, else 0."""
        try:
            value = self.of(node)
        except Unknown:
            return 0
        return value if isinstance(value, int) else 0


def _name(constants: Constants, node: Any, depth: int) -> Any:
    if node.name not in constants.values:
        raise Unknown
    return constants.values[node.name]


def _multiplied(constants: Constants, node: Any, depth: int) -> Any:
    left, right = constants.of(node.left, depth), constants.of(node.right, depth)
    sized = next((side for side in (left, right) if isinstance(side, (str, list, tuple))), "")
    count = next((side for side in (left, right) if isinstance(side, int)), 1)
    if len(sized) * count > MAX_SIZE:
        raise Unknown
    return left * right


def _item(constants: Constants, node: Any, depth: int) -> Any:
    value = constants.of(node.node, depth)
    if type(node.arg).__name__ != "Slice":
        return value[constants.of(node.arg, depth)]
    bounds = (node.arg.start, node.arg.stop, node.arg.step)
    return value[slice(*(None if bound is None else constants.of(bound, depth) for bound in bounds))]


def _call(constants: Constants, node: Any, depth: int) -> Any:
    """Methods of constant texts; ``dict(name=...)``, whose keys are texts."""
    arguments = [constants.of(argument, depth) for argument in node.args]
    named = {pair.key: constants.of(pair.value, depth) for pair in node.kwargs}
    if getattr(node.node, "name", "") == "dict":
        return dict(*arguments, **named)
    method, text = getattr(node.node, "attr", ""), constants.of(node.node.node, depth)
    if method not in _TEXT_METHODS or not isinstance(text, str):
        raise Unknown
    if method == "format" and not all(map(_PLAIN_FIELD.fullmatch, re.findall(r"\{([^{}]*)\}", text))):
        raise Unknown
    return getattr(text, method)(*arguments, **named)


def _filtered(constants: Constants, node: Any, depth: int) -> Any:
    if node.node is None or node.name not in _FILTERS or node.kwargs:
        raise Unknown
    arguments = [constants.of(argument, depth) for argument in node.args]
    return _FILTERS[node.name](constants.of(node.node, depth), *arguments)


def _formatted(pattern: Any, values: Any) -> str:
    """``pattern % values`` without widths."""
    if not isinstance(pattern, str) or _WIDTH.search(pattern):
        raise Unknown
    return pattern % (tuple(values) if isinstance(values, list) else values)


_EVALUATORS: Mapping[str, Callable[[Constants, Any, int], Any]] = {
    "Const": lambda constants, node, depth: node.value,
    "Name": _name,
    "Concat": lambda constants, node, depth: "".join(str(constants.of(part, depth)) for part in node.nodes),
    "List": lambda constants, node, depth: [constants.of(item, depth) for item in node.items],
    "Tuple": lambda constants, node, depth: tuple(constants.of(item, depth) for item in node.items),
    "Dict": lambda constants, node, depth: {
        constants.of(pair.key, depth): constants.of(pair.value, depth) for pair in node.items
    },
    "Add": lambda constants, node, depth: constants.of(node.left, depth) + constants.of(node.right, depth),
    "Mul": _multiplied,
    "Mod": lambda constants, node, depth: _formatted(constants.of(node.left, depth), constants.of(node.right, depth)),
    "Neg": lambda constants, node, depth: -constants.of(node.node, depth),
    "Getitem": _item,
    "Call": _call,
    "Filter": _filtered,
}
"""By the kind of node."""

_FILTERS: Mapping[str, Callable[..., Any]] = {
    "lower": lambda value: str(value).lower(),
    "upper": lambda value: str(value).upper(),
    "capitalize": lambda value: str(value).capitalize(),
    "title": lambda value: str(value).title(),
    "reverse": lambda value: value[::-1],
    "replace": lambda value, old, new: str(value).replace(old, new),
    "join": lambda value, by="": str(by).join(map(str, value)),
    "string": str,
    "trim": lambda value: str(value).strip(),
    "format": lambda value, *arguments: _formatted(value, arguments),
    "first": lambda value: next(iter(value)),
    "last": lambda value: list(value)[-1],
    "list": list,
    "safe": lambda value: value,
    "e": lambda value: value,
    "escape": lambda value: value,
}
