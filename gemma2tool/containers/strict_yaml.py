"""YAML from untrusted files: plain data only, with limits checked before and during parsing.

Aliases are refused, because a few lines of them can stand for billions of values or for a value that contains itself.
Tags are refused too, because they choose the type that a text is turned into. PyYAML raises Python's own exceptions for
some invalid texts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted

if TYPE_CHECKING:
    from yaml import MappingNode, ScalarNode, SequenceNode

    Node = ScalarNode | SequenceNode | MappingNode

MAX_DEPTH = 32


def load(text: str, *, what: str, max_chars: int) -> Any:
    """Parses a YAML document.

    Raises InputRefused (``yaml.*``) for more than ``max_chars`` characters, aliases, tags and invalid YAML.
    """
    import yaml

    return _parsed(yaml.load, text, what, max_chars)  # a SafeLoader makes plain data only


def compose(text: str, *, what: str, max_chars: int) -> Node | None:
    """The nodes of a YAML document, which know their lines; None for an empty one. Raises the same errors."""
    import yaml

    node: Node | None = _parsed(yaml.compose, text, what, max_chars)
    return node


def _parsed(parse: Callable[..., Any], text: str, what: str, max_chars: int) -> Any:
    import yaml

    if len(text) > max_chars:
        raise InputRefused("yaml.too-large", f"{what}: {len(text)} characters; at most {max_chars} are accepted")

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()  # type: ignore[no-untyped-call]  # types-PyYAML does not annotate it
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise InputRefused("yaml.alias", f"{what}: has an anchor or alias, which is not supported")
            if getattr(event, "tag", None) is not None:
                raise InputRefused("yaml.tag", f"{what}: has the tag {quoted(event.tag)}, which is not supported")
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise InputRefused("yaml.depth", f"{what}: nested more than {MAX_DEPTH} deep")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    try:
        return parse(text, Loader)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputRefused("yaml.syntax", f"{what}: not valid YAML: {_problem(error)}") from error


def _problem(error: Exception) -> str:
    """What the parser says, with the line where it says one."""
    import yaml

    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{quoted(error.problem)} in line {error.problem_mark.line + 1}"
    return quoted(str(error))
