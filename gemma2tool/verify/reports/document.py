"""A self-contained HTML page: its head, its style, its policy; no scripts, no network access."""

from __future__ import annotations

from pathlib import Path

from gemma2tool.verify.reports.markup import Markup, tag

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def document(title: str, *body: Markup) -> str:
    """The page; equal contents give equal bytes."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    return f'<!doctype html>\n<html lang="en">{head}{tag("body", *body)}</html>\n'
