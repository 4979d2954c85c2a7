"""Chat templates are programs of strangers: those that never end or fail are refused."""

from __future__ import annotations

import sys

import pytest

from gemma2tool.errors import InputRefused
from gemma2tool.pipeline.template import MAX_TEMPLATE_CHARS, render

pytest.importorskip("jinja2")
VALUES = {"messages": [{"role": "user", "content": "h\u00e9 <b>"}], "bos_token": "<bos>"}


def test_rendered() -> None:
    template = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}"
    assert render(template, VALUES, "here") == "<bos><user>h\u00e9 <b>"


@pytest.mark.slow
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
    monkeypatch.setattr("gemma2tool.pipeline.template.SECONDS", 1)
    with pytest.raises(InputRefused) as caught:
        render(template, VALUES, "here")
    assert caught.value.id.startswith(id) and caught.value.message.isprintable()
    assert "--raw" in caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        "{{ '%999999999d' | format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ 'a' | center(9999999999) }}",
        "{% set ns = namespace(x='a' * 1000) %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
        "{{ ns.x }}",
        "{% for a in range(99999) %}{{ 'a' * 100 }}{% endfor %}",
        "{{ range(99999) | batch(1) | list | length }}{% set x = 'a,' * 40000000 %}{{ x.split(',') | length }}",
    ],
)
def test_one_step_cannot_take_unlimited_time_or_memory(template: str) -> None:
    used, own = usage("RUSAGE_CHILDREN"), usage("RUSAGE_SELF")[1]
    with pytest.raises(InputRefused) as caught:
        render(template, VALUES, "here")
    seconds, peak = usage("RUSAGE_CHILDREN")
    assert caught.value.id == "template.limits"
    assert seconds - used[0] < 3 and peak <= max(used[1], own + (400 << 20))  # a fork begins with our pages


def usage(whose: str) -> tuple[float, int]:
    """Processor seconds, and the bytes of the largest process."""
    resource = pytest.importorskip("resource")
    used = resource.getrusage(getattr(resource, whose))
    return used.ru_utime + used.ru_stime, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.slow
def test_without_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.fork")
    monkeypatch.setattr("gemma2tool.pipeline.template.SECONDS", 0.2)
    assert render("{{ bos_token }}", VALUES, "here") == "<bos>"
    with pytest.raises(InputRefused, match=r"does not finish"):
        render("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", VALUES, "here")


def test_what_transformers_offers_beyond_jinja() -> None:
    template = (
        "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}"
        "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}{{ strftime_now('%%') }}"
    )
    assert render(template, {"messages": [{"a": "<\u00e9>"}] * 5}, "here") == '{"a": "<\u00e9>"}' * 2 + "%"


def test_text_is_returned_unchanged() -> None:
    text = "\n\0\ud800\u00e9\U0001f600\n" * 100_000
    assert render("{{ text }}\n\n", {"text": text}, "here") == text + "\n"
