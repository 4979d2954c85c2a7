"""The text of a recipe: keys and values with their lines, checked against the table of keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma2tool.containers import strict_yaml
from gemma2tool.errors import InputRefused, UsageError, choices
from gemma2tool.pipeline.recipe.keys import KEYS, OUTPUT, OUTPUTS, RUNS, SOURCE, Key
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.text_file import read_text

if TYPE_CHECKING:
    from gemma2tool.containers.strict_yaml import Node

MAX_CHARS = 1 << 20
_CASE = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_CALLED = {"flag": "true or false", "integer": "a whole number", "number": "a number"}


@dataclass(frozen=True)
class Value:
    """The value of a key: a text, number or flag, or a tuple of texts; ``line`` counts from 1."""

    key: Key
    content: Any
    line: int


Section = Mapping[str, Value]
"""Values by their keys."""


@dataclass(frozen=True)
class Run:
    """A source with what is asked of it, and its outputs, each with what is asked of it. ``line``: where it begins."""

    shared: Section
    outputs: tuple[Section, ...]
    line: int


def read_document(path: Path) -> tuple[Run, ...]:
    """The runs of a recipe.

    Raises ``UsageError`` (``recipe.*``), with file, line and key, for what is not a recipe.
    """
    try:
        node = strict_yaml.compose(read_text(path, what="recipe"), what=str(path), max_chars=MAX_CHARS)
    except InputRefused as error:
        if not error.id.startswith("yaml."):
            raise
        raise UsageError("recipe.syntax", error.message) from error
    return _Reader(path).runs(node)


@dataclass(frozen=True)
class _Reader:
    path: Path

    def runs(self, node: Node | None) -> tuple[Run, ...]:
        if node is None:
            raise UsageError("recipe.syntax", f"{self.path}: is empty")
        shared, lists = self._section(node, (OUTPUTS, RUNS))
        if RUNS not in lists:
            return (self._run({}, node),)
        if lists.keys() & {OUTPUTS} or shared.keys() & {SOURCE, OUTPUT}:
            here = next(iter({OUTPUTS, SOURCE, OUTPUT} & {*lists, *shared}))
            message = f"{here} is beside {RUNS}"
            raise self._error("recipe.key", node, message, hint=f"write {here} in each of the {RUNS}")
        return tuple(self._run(shared, run) for run in self._list(lists[RUNS], RUNS))

    def _run(self, above: Section, node: Node) -> Run:
        own, lists = self._section(node, (OUTPUTS,))
        shared = {**above, **own}
        if SOURCE not in shared:
            raise self._error("recipe.missing", node, f"{SOURCE} is missing")
        if OUTPUTS not in lists:
            if OUTPUT not in shared:
                raise self._error("recipe.missing", node, f"{OUTPUT} or {OUTPUTS} is missing")
            return Run(shared, (shared,), _line(node))
        if OUTPUT in shared:
            raise self._error("recipe.key", node, f"{OUTPUT} and {OUTPUTS} are both given", hint="write one of them")
        return Run(
            shared, tuple(self._output(shared, item) for item in self._list(lists[OUTPUTS], OUTPUTS)), _line(node)
        )

    def _output(self, shared: Section, node: Node) -> Section:
        own, _ = self._section(node, ())
        for name, value in own.items():
            if not value.key.of_output:
                hint = f"write it beside {SOURCE}: it holds for all outputs"
                raise UsageError("recipe.key", f"{self.path}:{value.line}: {name}: is not of one output", hint=hint)
        if OUTPUT not in own:
            raise self._error("recipe.missing", node, f"{OUTPUT} is missing")
        return {**{name: value for name, value in shared.items() if value.key.of_output}, **own}

    def _section(self, node: Node, lists: tuple[str, ...]) -> tuple[dict[str, Value], dict[str, Node]]:
        """The values of a mapping, and those of its keys in ``lists`` that it has."""
        if node.id != "mapping":
            raise self._error("recipe.syntax", node, "not a mapping of keys to values", hint="write KEY: VALUE")
        values: dict[str, Value] = {}
        nodes: dict[str, Node] = {}
        for key_node, value_node in node.value:
            name = str(key_node.value) if key_node.id == "scalar" else ""
            if name in values or name in nodes:
                raise self._error("recipe.key", key_node, f"{name}: is given twice")
            if name in lists:
                nodes[name] = value_node
            elif name in KEYS:
                values[name] = self._value(KEYS[name], value_node)
            else:
                raise self._error("recipe.key", key_node, f"{quoted(name)}: no such key", hint=_meant(name, lists))
        return values, nodes

    def _list(self, node: Node, name: str) -> list[Node]:
        if node.id == "sequence" and not node.value:
            raise self._error("recipe.value", node, f"{name}: is an empty list", hint="write at least one entry")
        if node.id != "sequence":
            raise self._error("recipe.value", node, f"{name}: is not a list", hint="begin each entry with '- '")
        entries: list[Node] = node.value
        return entries

    def _value(self, key: Key, node: Node) -> Value:
        if key.repeated:
            nodes = node.value if node.id == "sequence" else [node]
            return Value(key, tuple(self._scalar(key, item) for item in nodes), _line(node))
        return Value(key, self._scalar(key, node), _line(node))

    def _scalar(self, key: Key, node: Node) -> Any:
        """The value of one scalar, of the key's kind and within its bounds."""
        text = node.value if node.id == "scalar" else ""
        if node.id != "scalar" or (not text and key.kind != "text") or node.tag.endswith(":null"):
            called = "a list" if node.id == "sequence" else "a mapping" if node.id == "mapping" else "nothing"
            raise self._error("recipe.value", node, f"{key.name}: {called}, where one value is needed")
        content: Any = text
        try:
            if key.kind == "flag":
                content = _CASE[text.lower()]
            elif key.kind == "integer":
                content = int(text)
            elif key.kind == "number":
                content = float(text)
        except (KeyError, ValueError):
            message = f"{key.name}: {quoted(text)} is not {_CALLED[key.kind]}"
            raise self._error("recipe.value", node, message, hint=f"write {_CALLED[key.kind]}") from None
        if key.choices and str(content) not in key.choices:
            message = f"{key.name}: {quoted(text)} is not one of its values"
            raise self._error("recipe.value", node, message, hint=choices.hint(text, key.choices))
        if key.kind in ("integer", "number"):
            low, high = key.minimum, key.maximum
            if not ((low is None or content >= low) and (high is None or content <= high)):
                bounds = f"at least {low:g}" if high is None else f"from {low or 0:g} to {high:g}"
                raise self._error("recipe.value", node, f"{key.name}: {text} is out of range", hint=f"write {bounds}")
        return content

    def _error(self, id: str, node: Node, message: str, *, hint: str = "") -> UsageError:
        return UsageError(id, f"{self.path}:{_line(node)}: {message}", hint=hint)


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _meant(name: str, lists: tuple[str, ...]) -> str:
    """The hint for a key that there is not."""
    names = (*lists, *KEYS)
    likely = choices.meant(name.removeprefix("--"), names)
    if likely:
        return f"did you mean {' or '.join(likely)}?"
    return "keys are the options of convert and quantize without their dashes; docs/recipes.md lists them"
