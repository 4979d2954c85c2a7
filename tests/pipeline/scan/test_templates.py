"""Chat templates: every hostile one is a danger, no honest one is reported."""

from __future__ import annotations

import json

import pytest

from gemma2tool.pipeline.scan import jinja_flow
from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.finding import ScanFinding
from gemma2tool.pipeline.scan.template import hostile, scan_template
from gemma2tool.pipeline.scan.triggers import triggers
from gemma2tool.pipeline.template import environment
from tests.pipeline.scan.templates import HONEST, HOSTILE, ODD, TRIGGERS
from tests.support.paths import TINY


def findings(template: str) -> list[ScanFinding]:
    return list(scan_template(template, Place("t.jinja"), located=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_template_is_not_reported(name: str) -> None:
    assert findings(HONEST[name]) == []


def test_the_template_of_gemma_is_not_reported() -> None:
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    assert findings(config["chat_template"]) == []


SLOW = {"nested loops", "endless recursion that grows"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in HOSTILE])
def test_a_hostile_template_is_a_danger(name: str) -> None:
    danger = hostile(HOSTILE[name])
    assert danger is not None and danger.gain


@pytest.mark.slow
@pytest.mark.parametrize("id", ODD)
def test_an_odd_template_is_named(id: str) -> None:
    reported = findings(ODD[id])
    assert [finding.id for finding in reported] == [id]
    assert reported[0].severity == "odd"


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_text_that_a_template_looks_for_is_named_in_any_form(name: str) -> None:
    assert list(triggers(environment().parse(TRIGGERS[name])))
    assert not list(triggers(environment().parse(TRIGGERS[name].replace("messages", "tools"))))


@pytest.mark.slow
def test_an_entangled_template_is_not_followed_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja_flow, "MAX_STEPS", 1000)
    names = [f"a{number}" for number in range(40)]
    sums = "".join(f"{{% set {name} = [{', '.join(names)}] %}}" for name in names)
    asked = "".join(f"{{% if messages[0].content in {name} %}}1{{% endif %}}" for name in names)
    (finding,) = findings(sums + asked)
    assert finding.id == "template.endless" and "too long to follow" in finding.message


def test_the_line_is_named() -> None:
    (finding,) = findings("{{ bos_token }}\n\n{{ ''.__class__ }}")
    assert finding.line == 3 and "'__class__'" in finding.message
    (finding,) = scan_template("\n{{ ''.__class__ }}", Place("tokenizer_config.json", "chat_template"))
    assert finding.line is None and finding.message.endswith("in line 2 of the template")


def test_a_template_of_many_characters_is_not_rendered() -> None:
    assert [finding.id for finding in findings("a" * (1 << 19))] == ["template.endless"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token | no_such_filter }}",
        "{% if messages %}{{ bos_token }}{% else %}{{ 1 is no_such_test }}{% endif %}",
        "{{ " + " + ".join(["bos_token"] * 3000) + " }}",
        "{{ " + "(" * 400 + "1" + ")" * 400 + " }}",
        "{{ messages" + ".a" * 3000 + " }}",
    ],
    ids=["filter", "test in a branch", "long sum", "nested", "long chain"],
)
def test_a_template_that_cannot_be_compiled_is_not_called_endless(template: str) -> None:
    assert {finding.id for finding in findings(template)} <= {"template.syntax"}


@pytest.mark.slow
def test_what_a_long_sum_hides_is_found() -> None:
    reported = findings("{{ " + " + ".join(["''.__class__", *["bos_token"] * 3000]) + " }}")
    assert [finding.id for finding in reported] == ["template.internals", "template.syntax"]


def test_internals_in_a_branch_that_no_conversation_takes() -> None:
    """The name is put together in a way that only rendering follows."""
    name = "{% set n = namespace(s='__') %}{% if nothing %}{% set n.s = n.s ~ 'class__' %}"
    (finding,) = findings(name + "{{ ''[n.s] }}{% endif %}")
    assert finding.id == "template.internals" and "rendered" in finding.message
