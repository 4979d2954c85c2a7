"""YAML from untrusted files: plain data only, with limits checked before and during parsing.

Aliases are refused, because a few lines of them can stand for billions of values or for a value that contains itself.
Tags are refused too, because they choose the type that a text is turned into. PyYAML raises Python's own exceptions for
some invalid texts.
"""

from __future__ import annotations

from typing import Any

from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted

MAX_DEPTH = 32


def load(text: str, *, what: str, max_chars: int) -> Any:
    """Parses a YAML document.

    Raises InputRefused (``yaml.*``) for more than ``max_chars`` characters, aliases, tags and invalid YAML.
    """
    import yaml

    if len(text) > max_chars:
        raise InputRefused("yaml.too-large", f"{what}: {len(text)} characters; at most {max_chars} are accepted")

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()  # type: ignore[no-untyped-call]  # types-PyYAML does not annotate it
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise InputRefused("yaml.alias", f"{what}: has an anchor or alias, which is not read")
            if getattr(event, "tag", None) is not None:
                raise InputRefused("yaml.tag", f"{what}: has the tag {quoted(event.tag)}, which is not read")
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise InputRefused("yaml.depth", f"{what}: nested more than {MAX_DEPTH} deep")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    try:
        return yaml.load(text, Loader)  # a SafeLoader makes plain data only
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputRefused("yaml.syntax", f"{what}: not valid YAML: {quoted(str(error))}") from error
