"""What a chat template asks of the texts in a conversation: where what a message says meets the template's own texts.

Values are followed from ``messages`` through assignments, loops, macros, filters and methods, without regard to order:
a name is all that it is ever given. An expression in which a text of a message and a constant meet is a question,
whatever its form: a comparison, a search, a replacement, a table that is indexed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma2tool.pipeline.scan.jinja_constants import Constants, Unknown, walk
from gemma2tool.pipeline.scan.jinja_scopes import Scopes

if TYPE_CHECKING:
    from jinja2 import nodes

Kinds = frozenset[str]
NOTHING: Kinds = frozenset()
MESSAGES, MESSAGE, CONTENT, PART, TEXT = (frozenset({kind}) for kind in "MmCPT")
"""What a value holds: all messages, one of them, what one says (a text or a list of parts), one of these parts, a text
made of it.
"""
_SAID = CONTENT | PART | TEXT
_TEXT_KEYS = frozenset({"content", "text"})
_SAME_LIST = frozenset({"list", "reverse", "selectattr", "rejectattr", "select", "reject", "sort", "unique"})
_NUMBERS = frozenset({"length", "count", "wordcount", "int", "float", "abs", "round"})
_NO_QUESTION = frozenset(
    {
        *("join", "default", "d", "map", "indent", "wordwrap", "truncate", "attr", "tojson", "format", "center"),
        *("sort", "dictsort", "groupby", "sum", "unique", "min", "max", "batch", "slice", "get", "append", "items"),
        *("ljust", "rjust", "encode", "decode", "update"),
    }
)
"""Filters and methods whose texts are put between, around or in place of what a message says, or name attributes."""
_WRITE = frozenset({"Output", "If", "For", "FilterBlock", "With", "Scope", "ScopedEvalContextModifier", "CallBlock"})
"""Statements that write, or hold others that do."""
_MAX_ROUNDS = 20
MAX_STEPS = 300_000
"""Of looking for the texts of a template: real ones take a few hundred."""


@dataclass(frozen=True)
class Question:
    """A text of the template that meets what a message says, and the line."""

    text: str
    line: int


def questions(tree: nodes.Template, constants: Constants) -> Iterator[Question]:
    """Every text that the template looks for in what messages say.

    Raises ``Unknown`` for a template that is too large or entangled to be followed.
    """
    flow = _Flow(tree, constants)
    for node in flow.nodes:
        for asked in flow.asked(node):
            for text in flow.texts(asked):
                yield Question(text, node.lineno)


class _Flow:
    """What every variable holds: ``kinds``, and the expressions that it is given, in ``given``."""

    def __init__(self, tree: nodes.Template, constants: Constants) -> None:
        self.nodes: list[Any] = list(walk(tree))
        self.constants, self.scopes = constants, Scopes(tree)
        self.kinds: dict[str, Kinds] = {"0:messages": MESSAGES}
        self.given: dict[str, list[Any]] = {}
        self.macros = {node.name: node for node in self.nodes if type(node).__name__ == "Macro"}
        self.held: dict[int, Kinds] = {}
        self.left = MAX_STEPS
        continued = self.scopes.continued()
        # Parts stand after the whole in this list: no recursion, as expressions may be long.
        steps = [(node, self._rule("of", node), self._rule("bind", node)) for node in reversed(self.nodes)]
        steps = [(node, rule, bind) for node, rule, bind in steps if rule is not None or bind is not None]
        for _ in range(_MAX_ROUNDS):
            before = dict(self.kinds)
            for node, rule, bind in steps:
                if rule is not None:
                    self.held[id(node)] = rule(node)
                if bind is not None:
                    bind(node)
            for inner, outer in continued:
                self._give(inner, self.kinds.get(outer, NOTHING))
            if self.kinds == before:
                break

    def _rule(self, name: str, node: Any) -> Callable[[Any], Any] | None:
        rule: Callable[[Any], Any] | None = getattr(self, f"_{name}_{type(node).__name__.lower()}", None)
        return rule

    # -- what names are given

    def _give(self, name: str, kinds: Kinds, expression: Any = None) -> None:
        self.kinds[name] = self.kinds.get(name, NOTHING) | kinds
        if expression is not None and not any(expression is known for known in self.given.setdefault(name, [])):
            self.given[name].append(expression)

    def _give_target(self, target: Any, kinds: Kinds, expression: Any) -> None:
        kind = type(target).__name__
        if kind == "Name":
            self._give(self.scopes.variable(target), kinds, expression)
        elif kind == "NSRef":
            self._give(f"{self.scopes.variable(target)}.{target.attr}", kinds, expression)
        elif kind == "Tuple":
            values = expression.items if type(expression).__name__ == "Tuple" else []
            for index, item in enumerate(target.items):
                own = values[index] if index < len(values) else None
                self._give_target(item, self.of(own) if own is not None else kinds, own or expression)

    def _bind_assign(self, node: Any) -> None:
        self._give_target(node.target, self.of(node.node), node.node)
        is_namespace = getattr(getattr(node.node, "node", None), "name", "") == "namespace"
        if is_namespace and type(node.target).__name__ == "Name":
            for pair in node.node.kwargs:
                self._give(f"{self.scopes.variable(node.target)}.{pair.key}", self.of(pair.value), pair.value)

    def _bind_assignblock(self, node: Any) -> None:
        self._give_target(node.target, self._written(node.body), None)

    def _bind_for(self, node: Any) -> None:
        kinds = self.of(node.iter)
        items = MESSAGE if kinds & MESSAGES else NOTHING
        items |= PART if kinds & CONTENT else NOTHING
        items |= TEXT if kinds & (PART | TEXT) else NOTHING
        self._give_target(node.target, items, node.iter)
        for name in ("0:loop.previtem", "0:loop.nextitem"):
            self._give(name, items)

    def _bind_call(self, node: Any) -> None:
        macro = self.macros.get(getattr(node.node, "name", ""))
        if macro is None:
            return
        scope, names = self.scopes.inner[id(macro)], [argument.name for argument in macro.args]
        for index, argument in enumerate(node.args):
            name = f"{scope}:{names[index]}" if index < len(names) else "0:varargs"
            self._give(name, self.of(argument), argument)
        for pair in node.kwargs:
            name = f"{scope}:{pair.key}" if pair.key in names else "0:kwargs"
            self._give(name, self.of(pair.value), pair.value)

    def _bind_callblock(self, node: Any) -> None:
        self._give("caller()", self._written(node.body))

    def _bind_macro(self, node: Any) -> None:
        self._give(f"{node.name}()", self._written(node.body))

    def _written(self, body: Iterable[Any]) -> Kinds:
        """TEXT if what these statements write has a text of a message."""
        return TEXT if any(self.of(node) for node in body if type(node).__name__ in _WRITE) else NOTHING

    # -- what an expression holds

    def of(self, node: Any) -> Kinds:
        """What the value of an expression holds."""
        return self.held.get(id(node), NOTHING)

    def _of_output(self, node: Any) -> Kinds:
        return self._joined(*node.nodes)

    def _of_if(self, node: Any) -> Kinds:
        return self._written(node.iter_child_nodes())

    _of_for = _of_with = _of_scope = _of_filterblock = _of_callblock = _of_scopedevalcontextmodifier = _of_if

    def _of_name(self, node: Any) -> Kinds:
        return self.kinds.get(self.scopes.variable(node), NOTHING)

    def _of_getattr(self, node: Any) -> Kinds:
        return self._item(node.node, str(node.attr))

    def _of_getitem(self, node: Any) -> Kinds:
        if type(node.arg).__name__ == "Slice":
            return self.of(node.node)
        return self._item(node.node, self._key(node.arg)) | (TEXT if self.of(node.arg) & _SAID else NOTHING)

    def _key(self, node: Any) -> Any:
        try:
            return self.constants.of(node)
        except Unknown:
            return None

    def _item(self, owner: Any, key: Any) -> Kinds:
        """``owner.key`` or ``owner[key]``; the key is None where it is computed."""
        if type(owner).__name__ == "Name" and (named := self.kinds.get(f"{self.scopes.variable(owner)}.{key}")):
            return named
        kinds = self.of(owner)
        is_number, is_text = isinstance(key, int), key is None or key in _TEXT_KEYS
        result = MESSAGE if kinds & MESSAGES and (is_number or key is None) else NOTHING
        if kinds & MESSAGE and is_text:
            result |= CONTENT
        if kinds & CONTENT and (is_number or key is None):
            result |= PART
        if kinds & (PART | TEXT) and (is_text or is_number):
            result |= TEXT
        return result

    def _of_call(self, node: Any) -> Kinds:
        called = node.node
        name = getattr(called, "name", "")
        if name in self.macros:
            return self.kinds.get(f"{name}()", NOTHING)
        if name == "caller":
            return self.kinds.get("caller()", NOTHING)
        arguments = [*node.args, *(pair.value for pair in node.kwargs)]
        held = TEXT if any(self.of(argument) for argument in arguments) else NOTHING
        if type(called).__name__ not in ("Getattr", "Getitem"):
            return held
        owner = self.of(called.node)
        method = str(called.attr) if type(called).__name__ == "Getattr" else self._key(called.arg)
        if method == "get" and owner & (MESSAGE | PART) and node.args:
            return self._item(called.node, self._key(node.args[0])) | held
        if method in ("items", "values") and owner:
            return TEXT
        return held | (TEXT if owner & _SAID else NOTHING)

    def _of_filter(self, node: Any) -> Kinds:
        kinds = self.of(node.node)
        if not kinds or node.name in _NUMBERS:
            return NOTHING
        if kinds & MESSAGES:
            if node.name in _SAME_LIST:
                return MESSAGES
            if node.name in ("first", "last", "random"):
                return MESSAGE
            if node.name == "map" and (key := self._mapped(node)) is not None:
                return TEXT if key in _TEXT_KEYS else NOTHING
        if kinds & CONTENT and node.name in ("list", "first", "last", "reverse", "selectattr", "rejectattr"):
            return PART if node.name in ("first", "last") else CONTENT
        return TEXT

    def _mapped(self, node: Any) -> Any:
        return next((self._key(pair.value) for pair in node.kwargs if pair.key == "attribute"), None)

    def _joined(self, *parts: Any) -> Kinds:
        return TEXT if any(self.of(part) for part in parts) else NOTHING

    def _of_concat(self, node: Any) -> Kinds:
        return self._joined(*node.nodes)

    def _of_add(self, node: Any) -> Kinds:
        kinds = self.of(node.left) | self.of(node.right)
        return MESSAGES if kinds & MESSAGES else TEXT if kinds else NOTHING

    def _of_mod(self, node: Any) -> Kinds:
        return self._joined(node.left, node.right)

    def _of_mul(self, node: Any) -> Kinds:
        return self._joined(node.left, node.right)

    def _of_list(self, node: Any) -> Kinds:
        kinds = frozenset[str]().union(*map(self.of, node.items))
        return MESSAGES if kinds & MESSAGE else TEXT if kinds else NOTHING

    _of_tuple = _of_list

    def _of_dict(self, node: Any) -> Kinds:
        return self._joined(*(pair.value for pair in node.items))

    def _of_condexpr(self, node: Any) -> Kinds:
        return self.of(node.expr1) | (NOTHING if node.expr2 is None else self.of(node.expr2))

    def _of_or(self, node: Any) -> Kinds:
        return self.of(node.left) | self.of(node.right)

    _of_and = _of_or

    # -- where a text of a message meets another one

    def asked(self, node: Any) -> Iterator[Any]:
        """The expressions that meet what a message says in ``node``."""
        kind = type(node).__name__
        if kind == "Compare":
            left = node.expr
            for operand in node.ops:
                yield from self._compared(left, operand)
                left = operand.expr
        elif kind == "Call":
            yield from self._called(node)
        elif kind in ("Filter", "Test") and node.node is not None:
            yield from self._filtered(node)
        elif kind == "Getitem" and type(node.arg).__name__ != "Slice" and self.of(node.arg) & _SAID:
            yield node.node

    def _compared(self, left: Any, operand: Any) -> Iterator[Any]:
        right = operand.expr
        is_key = operand.op in ("in", "notin") and not self.of(right) & (CONTENT | TEXT)
        if self.of(right) & _SAID and not is_key:
            yield left
        if self.of(left) & _SAID:
            yield right

    def _called(self, node: Any) -> Iterator[Any]:
        called = node.node
        if type(called).__name__ not in ("Getattr", "Getitem"):
            return
        method = str(called.attr) if type(called).__name__ == "Getattr" else self._key(called.arg)
        arguments = [*node.args, *(pair.value for pair in node.kwargs)]
        if any(self.of(argument) & _SAID for argument in arguments) and method not in _NO_QUESTION - {"get"}:
            yield called.node
        if self.of(called.node) & _SAID and method not in _NO_QUESTION:
            yield from arguments

    def _filtered(self, node: Any) -> Iterator[Any]:
        kinds = self.of(node.node)
        arguments = [*node.args, *(pair.value for pair in node.kwargs)]
        if node.name in ("selectattr", "rejectattr"):
            if kinds and arguments and self._key(arguments[0]) in (*_TEXT_KEYS, None):
                yield from arguments[2:]
        elif node.name in ("select", "reject"):
            if kinds & _SAID:
                yield from arguments[1:]
        elif kinds & _SAID and node.name not in _NO_QUESTION:
            yield from arguments
        elif any(self.of(argument) & _SAID for argument in arguments) and node.name not in _NO_QUESTION:
            yield node.node

    def texts(self, node: Any) -> Iterator[str]:
        """The texts that an expression can give: its value, or every constant in it and in what its names are given.

        Raises ``Unknown`` where a template asks more than can be followed.
        """
        rest, seen = [node], set[int]()
        while rest:
            part = rest.pop()
            self.left -= 1
            if self.left < 0:
                raise Unknown
            if id(part) in seen:
                continue
            seen.add(id(part))
            with suppress(Unknown):
                yield from _strings(self.constants.of(part))
                continue
            if type(part).__name__ == "Name" and not self.of(part):
                rest += self.given.get(self.scopes.variable(part), ())
            rest += part.iter_child_nodes()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (key for key in value if isinstance(key, str))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
