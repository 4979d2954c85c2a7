"""Tables and figures of a page, readable on a phone."""

from __future__ import annotations

from collections.abc import Sequence

from gemma2tool.verify.reports.markup import Markup, tag

_COLUMN_CLASSES = {"#": "number", "|": "wide"}


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Markup:
    """A table whose first column names the row. A column whose name ends in "#" contains numbers, one whose name ends
    in "|" bars. On a phone every row is a block, whose cells show the names of their columns.
    """
    names = [column.rstrip("#|") for column in columns]
    classes = [_COLUMN_CLASSES.get(column[-1]) for column in columns]
    heads = (tag("th", name, scope="col", class_=style) for name, style in zip(names, classes, strict=True))
    body = []
    for first, *cells in rows:
        others = zip(cells, names[1:], classes[1:], strict=True)
        tds = (tag("td", cell, class_=style, data_label=name) for cell, name, style in others)
        body.append(tag("tr", tag("th", first, scope="row"), *tds))
    return tag("div", tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *body)), class_="table")


def figure(title: str, caption: str, *content: object) -> Markup:
    """Drawings below their title and a sentence about them."""
    return tag("figure", tag("figcaption", title, tag("span", caption)), *content)
