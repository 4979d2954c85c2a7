"""HTML and SVG elements that escape whatever is put into them, so that nothing from a file can become markup."""

from __future__ import annotations

import html

from gemma2tool.storage.quoting import one_line

VOID = frozenset({"meta", "br", "col", "link"})


class Markup(str):
    """Text that is markup already; every other text is escaped on its way in."""

    __slots__ = ()


def escaped(content: object) -> Markup:
    """``content`` as text of an element or an attribute: markup as it is, all else with what could act or hide shown as an escape."""
    return content if isinstance(content, Markup) else Markup(html.escape(one_line(content), quote=True))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """``<name attribute="...">children</name>``. An underscore at the end of an attribute is dropped (``class_``), others become
    hyphens; attributes that are None are left out, and so are children."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*parts: object) -> Markup:
    """Parts one after the other, each escaped unless it is markup."""
    return Markup("".join(escaped(part) for part in parts if part is not None))
