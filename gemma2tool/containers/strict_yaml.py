"""YAML from untrusted files: plain data only, bounded before and while it is parsed.

Aliases are refused: a few lines of them stand for billions of values, or for a value that contains itself. So are tags, which choose
what is made of a text. PyYAML answers some texts with errors of Python's own.
"""

from __future__ import annotations

from typing import Any

from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted

MAX_DEPTH = 32


def load(text: str, *, what: str, max_chars: int) -> Any:
    """The value of a YAML document. Raises InputRefused (``yaml.*``) for more than ``max_chars`` characters, aliases, tags and whatever
    is no YAML."""
    import yaml

    if len(text) > max_chars:
        raise InputRefused("yaml.too-large", f"{what}: {len(text)} characters; at most {max_chars} are accepted")

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise InputRefused("yaml.alias", f"{what}: has an anchor or an alias, which are not read")
            if getattr(event, "tag", None) is not None:
                raise InputRefused("yaml.tag", f"{what}: has the tag {quoted(event.tag)}, which is not read")
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise InputRefused("yaml.depth", f"{what}: nested more than {MAX_DEPTH} deep")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    try:
        return yaml.load(text, Loader)  # a SafeLoader: of plain data only
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputRefused("yaml.syntax", f"{what}: not valid YAML: {quoted(str(error))}") from error
