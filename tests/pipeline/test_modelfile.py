"""Modelfiles: what ollama makes of a conversation with them is what the model's chat template makes of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from gemma2tool.errors import InputRefused
from gemma2tool.formats import registry
from gemma2tool.pipeline.modelfile import CHATML, GEMMA, Message, Render, Turns, modelfile, turns_of
from gemma2tool.pipeline.prompt import render_chat
from tests.support.commands import run
from tests.support.paths import TINY


def by_ollama(template: str, messages: Sequence[Message]) -> str:
    """The prompt that ollama makes with a template of ``.System``, ``.Prompt`` and ``.Response``: it runs once for each
    pair of turns, the last time up to the response.
    """

    def execute(template: str, values: dict[str, str]) -> str:
        rendered = re.sub(
            r"\{\{ if \.(\w+) \}\}(.*?)\{\{ end \}\}", lambda m: m[2] if values[m[1]] else "", template, flags=re.S
        )
        return re.sub(r"\{\{ \.(\w+) \}\}", lambda m: values[m[1]], rendered)

    text, values = "", dict.fromkeys(("System", "Prompt", "Response"), "")
    for message in messages:
        values[{"system": "System", "user": "Prompt", "assistant": "Response"}[message["role"]]] = message["content"]
        if message["role"] == "assistant":
            text += execute(template, values)
            values = dict.fromkeys(values, "")
    return text + execute(template.partition("{{ .Response }}")[0], values)


def conversation(system: str | None, *texts: str) -> list[Message]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, *({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts))]


def renderer(turns: Turns, *, refuses_system: bool = False) -> Render:
    def render(messages: Sequence[Message]) -> str:
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        if refuses_system and system is not None:
            raise InputRefused("template.broken", "system role not supported")
        return turns.conversation(system, *(m["content"] for m in messages if m["role"] != "system"))

    return render


FORMS = [GEMMA, CHATML, Turns("<start_of_turn>", "<end_of_turn>", "model", "\n"),
         Turns("<start_of_turn>", "<end_of_turn>", "model", None)]  # fmt: skip


@pytest.mark.parametrize("turns", FORMS, ids=["gemma", "chatml", "newline", "gemma-system"])
@pytest.mark.parametrize("system", [None, "Answer in verse."])
def test_ollama_makes_the_same_prompts(turns: Turns, system: str | None) -> None:
    known = turns_of(renderer(turns))
    assert known == turns
    for texts in (("Hi",), ("Hi", "Hello.", "Why?"), ("a\n\nb", "c", "d", "e", "f")):
        messages = conversation(system, *texts)
        assert by_ollama(known.template(), messages) == renderer(turns)(messages)


def test_a_template_that_refuses_system_messages_gets_them_in_the_first_turn() -> None:
    assert turns_of(renderer(GEMMA, refuses_system=True)) == GEMMA


@pytest.mark.parametrize("text", ["", "[INST] Why? [/INST]", "<start_of_turn>user\nWhy?<end_of_turn>\n"])
def test_other_turns_are_not_guessed(text: str) -> None:
    assert turns_of(lambda messages: text) is None
    odd_system = lambda m: GEMMA.conversation(None, "Why?", "Because.", "How?") if m[0]["role"] == "user" else text  # noqa: E731
    assert turns_of(odd_system) is None


@pytest.mark.slow
def test_the_fixture() -> None:
    with registry.open_checkpoint(TINY) as checkpoint:
        text, remark = modelfile(checkpoint, "tiny.gguf")
        expected = render_chat(checkpoint, conversation(None, "Hi", "Hello.", "Why?"))
    first, rest = text.split("\n", 1)
    template, stop = rest.removeprefix('TEMPLATE """').split('"""\n')
    assert (first, stop, remark) == ("FROM ./tiny.gguf", 'PARAMETER stop "<end_of_turn>"\n', None)
    assert by_ollama(template, conversation(None, "Hi", "Hello.", "Why?")) == expected


@pytest.mark.slow
def test_beside_a_gguf_and_nothing_else(tmp_path: Path) -> None:
    refused = run("convert", TINY, tmp_path / "folder", "--modelfile", "--no-verify")
    assert refused.exit_code == 2 and "option.ignored" in refused.output and not any(tmp_path.iterdir())
    (tmp_path / "m.Modelfile").write_text("mine")
    refused = run("convert", TINY, tmp_path / "m.gguf", "--modelfile", "--no-verify")
    assert refused.exit_code == 2 and not (tmp_path / "m.gguf").exists()
    done = run("convert", TINY, tmp_path / "m.gguf", "--modelfile", "--no-verify", "--force")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "m.Modelfile").read_text().startswith('FROM ./m.gguf\nTEMPLATE """<start_of_turn>user\n')
