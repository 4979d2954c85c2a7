"""HTML and SVG elements that escape their content, so that nothing from a file can become markup."""

from __future__ import annotations

import html

from gemma2tool.storage.quoting import one_line

VOID = frozenset({"meta", "br", "col", "link"})
"""Elements without an end tag."""


class Markup(str):
    """Text that is already markup; all other text is escaped when it is put into an element."""

    __slots__ = ()


def escaped(content: object) -> Markup:
    """``content`` as the text of an element or attribute. Markup is unchanged; in all else, special and invisible
    characters are escaped."""
    return content if isinstance(content, Markup) else Markup(html.escape(one_line(content), quote=True))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """``<name attribute="...">children</name>``.

    In the name of an attribute, a trailing underscore is dropped (``class_``) and others become hyphens. Attributes and
    children that are None are left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*parts: object) -> Markup:
    """The parts one after the other, each escaped unless it is markup; None is left out."""
    return Markup("".join(escaped(part) for part in parts if part is not None))
