"""A Modelfile beside a GGUF: what ``ollama create -f`` reads.

Ollama does not run chat templates in Jinja's language. Its own templates are Go's, so one is written for models whose
chat template gives the turns of Gemma or of ChatML, which is seen from what it renders; ollama puts bos before them
itself. The template has ``.System``, ``.Prompt`` and ``.Response``: ollama runs it once for each pair of turns, the
last time up to ``.Response`` (ollama's template/template.go).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.base import Output
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.prompt import render_chat
from gemma2tool.storage.paths import refuse_existing
from gemma2tool.storage.staging.staged_output import Staging

SUFFIX = ".Modelfile"

Message = Mapping[str, str]
Render = Callable[[Sequence[Message]], str]

_SYSTEM, _USER, _ANSWER, _NEXT = "Be brief.", "Why?", "Because.", "How?"


@dataclass(frozen=True)
class Turns:
    """How a family of chat templates writes a conversation: ``start`` ROLE newline TEXT ``stop`` newline. ``model``:
    the role of answers. ``system``: what separates a system message from the user's text in the same turn; None if it
    is a turn of its own.
    """

    start: str
    stop: str
    model: str
    system: str | None = "\n\n"

    def turn(self, role: str, text: str) -> str:
        """A whole turn."""
        return f"{self.start}{role}\n{text}{self.stop}\n"

    def conversation(self, system: str | None, *texts: str) -> str:
        """The text of a conversation whose ``texts`` are the user's and the model's by turns, up to the next answer."""
        first, *others = texts
        before = ""
        if system is not None and self.system is None:
            before = self.turn("system", system)
        elif system is not None:
            first = f"{system}{self.system}{first}"
        turns = (self.turn(self.model if number % 2 else "user", text) for number, text in enumerate((first, *others)))
        return f"{before}{''.join(turns)}{self.start}{self.model}\n"

    def template(self) -> str:
        """In Go's language."""
        system = self.turn("system", "{{ .System }}") if self.system is None else f"{{{{ .System }}}}{self.system}"
        system = f"{{{{ if .System }}}}{system}{{{{ end }}}}"
        if self.system is None:
            return system + self.turn("user", "{{ .Prompt }}") + self.turn(self.model, "{{ .Response }}")
        return self.turn("user", f"{system}{{{{ .Prompt }}}}") + self.turn(self.model, "{{ .Response }}")


GEMMA = Turns("<start_of_turn>", "<end_of_turn>", "model")
CHATML = Turns("<|im_start|>", "<|im_end|>", "assistant", None)
_SYSTEMS = ("\n\n", "\n", None)


def turns_of(render: Render) -> Turns | None:
    """The turns that a chat template writes; None if they are not Gemma's or ChatML's. ``render``: runs it on messages,
    and gives their text without bos.

    A template that refuses system messages, as Gemma's own, gets them before the first text of the user, which is what
    Gemma's makers advise.
    """
    texts = _rendered(render, _messages(None, _USER, _ANSWER, _NEXT))
    family = next(
        (turns for turns in (GEMMA, CHATML) if texts == turns.conversation(None, _USER, _ANSWER, _NEXT)), None
    )
    if family is None:
        return None
    with_system = _rendered(render, _messages(_SYSTEM, _USER))
    if with_system is None:
        return Turns(family.start, family.stop, family.model)
    forms = (Turns(family.start, family.stop, family.model, system) for system in _SYSTEMS)
    return next((turns for turns in forms if with_system == turns.conversation(_SYSTEM, _USER)), None)


def _messages(system: str | None, *texts: str) -> list[Message]:
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return [*first, *({"role": roles[number % 2], "content": text} for number, text in enumerate(texts))]


def _rendered(render: Render, messages: Sequence[Message]) -> str | None:
    """None for what a template refuses."""
    try:
        return render(messages)
    except InputRefused:
        return None


def modelfile(checkpoint: Checkpoint, gguf: str) -> tuple[str, str | None]:
    """The text of a Modelfile for the file ``gguf`` beside it, made from ``checkpoint``, and a remark where it has no
    template though the model has one.
    """
    lines, remark = [f"FROM ./{gguf}"], None
    if checkpoint.tokenizer.chat_template is not None:
        turns = turns_of(lambda messages: render_chat(checkpoint, messages))
        if turns is None:
            remark = "no TEMPLATE is written: the chat template's turns are not those of Gemma or ChatML"
        else:
            lines += [f'TEMPLATE """{turns.template()}"""', f'PARAMETER stop "{turns.stop}"']
    return "\n".join([*lines, ""]), remark


def modelfile_path(gguf: Path) -> Path:
    return gguf.with_name(gguf.stem + SUFFIX)


def check_modelfile(destination: Path, output: Output, *, force: bool) -> None:
    """Raises ``UsageError``, before any work, for an output that ollama does not import, and for a Modelfile that is
    there and may not be replaced.
    """
    if output.format != "gguf" or not output.single_file:
        message = f"--modelfile has no effect for {destination}: ollama imports GGUF in a single file"
        raise UsageError("option.ignored", message)
    if not destination.name.isprintable():
        raise UsageError("output.name", f"{destination.name!r}: a Modelfile cannot name this file")
    refuse_existing(modelfile_path(destination), force=force, folder=False)


def write_modelfile(text: str, destination: Path, *, force: bool) -> Path:
    """Writes it beside the GGUF ``destination``; returns its path."""
    path, data = modelfile_path(destination), text.encode()
    with Staging(path, force=force, expected_bytes=len(data)) as staging:
        staging.write_bytes(path.name, data)
        staging.commit()
    return path
