"""Chat templates are programs of strangers: those that never end or fail are refused."""

from __future__ import annotations

import pytest

from gemma2tool.errors import InputRefused
from gemma2tool.pipeline.template import MAX_TEMPLATE_CHARS, render

pytest.importorskip("jinja2")
VALUES = {"messages": [{"role": "user", "content": "h\u00e9 <b>"}], "bos_token": "<bos>"}


def test_rendered() -> None:
    template = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}"
    assert render(template, VALUES, "here") == "<bos><user>h\u00e9 <b>"


@pytest.mark.parametrize(
    ("template", "id"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "template.limits"),
        ("{{ 'a' * 999999999999 }}", "template."),
        ("{{ 9 ** 9 ** 9 }}", "template.broken"),
        ("{% set f = messages.append %}{{ f(1) }}", "template.broken"),
        ("{{ 1 / 0 }}", "template.broken"),
        ("{{ raise_exception('\x1b[2J') }}", "template.broken"),
        ("{% for", "template.broken"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "template.broken"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "template."),
        ("x" * (MAX_TEMPLATE_CHARS + 1), "template.too-large"),
    ],
)
def test_refused(template: str, id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma2tool.pipeline.template.SECONDS", 0.5)
    with pytest.raises(InputRefused) as caught:
        render(template, VALUES, "here")
    assert caught.value.id.startswith(id) and caught.value.message.isprintable()
    assert "--raw" in caught.value.hint
