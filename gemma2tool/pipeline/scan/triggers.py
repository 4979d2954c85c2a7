"""Texts that a chat template looks for in what messages say, if no template needs to look for them.

Templates look for the markup of conversations: thoughts, calls of tools, turns, and what they write themselves. What
else people talk about is no business of theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gemma2tool.pipeline.scan.jinja_constants import Constants, walk
from gemma2tool.pipeline.scan.jinja_flow import questions

if TYPE_CHECKING:
    from jinja2 import nodes

_MARKUP = re.compile(r"<[^<>\n]{1,48}>|\[/?[A-Z_]{3,24}\]|/[a-z_]{4,12}\b")
_ROLES = frozenset({"assistant", "user", "system", "model", "tool", "function", "developer"})
_MARKS = re.compile(
    "think|thought|reason|tool|function|call|response|result|arg|param|channel|message|turn|start|end|role|header|"
    "inst|im_|image|img|video|audio|vision|answer|observ|code|python|output|context|document|step|plan|"
    "user|assistant|system|model|media|file|special|sep|pad|bos|eos|eot|eom|unk|\\bs\\b"
)
"""What markup of conversations is called by."""


def triggers(tree: nodes.Template) -> Iterator[tuple[str, int]]:
    """Texts that a template looks for in what messages say and that are not markup, with their lines.

    Raises ``Unknown`` for a template that is too entangled to be followed.
    """
    constants = Constants(tree)
    asked = list(questions(tree, constants))
    if not any(_is_words(question.text) for question in asked):
        return
    written = _written(tree)
    for question in asked:
        if _is_words(question.text) and not (_marks(question.text) and question.text in written):
            yield question.text, question.line


def _is_words(text: str) -> bool:
    """Whether something remains of a text without the markup of conversations."""
    rest = _MARKUP.sub(lambda match: "" if _MARKS.search(match[0].lower()) else match[0], text).strip()
    return rest not in _ROLES and any(char.isalnum() or (ord(char) > 0x7F and not char.isspace()) for char in rest)


def _marks(text: str) -> bool:
    """Whether a text has the form of markup at all."""
    return _MARKUP.search(text) is not None


def _written(tree: nodes.Template) -> str:
    """What a template writes: its plain text, and the constants that it puts out as they are."""
    pieces: list[str] = []
    for node in walk(tree):
        parts: list[Any] = list(node.iter_child_nodes()) if type(node).__name__ == "Output" else []
        while parts:
            part = parts.pop()
            if type(part).__name__ in ("TemplateData", "Const"):
                pieces.append(str(getattr(part, "data", getattr(part, "value", ""))))
            elif type(part).__name__ in ("Add", "Concat"):
                parts += part.iter_child_nodes()
    return "\n".join(pieces)
