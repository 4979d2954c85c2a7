"""The chat template, rendered on a few conversations in the sandbox, and the tokens that it writes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused
from gemma2tool.formats.tokenizers.files import MAX_JSON_BYTES, templates_of
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.names import EMBEDDING
from gemma2tool.model.tokenizer import DEFAULT_TEMPLATE, Tokenizer
from gemma2tool.pipeline.checks.catalog import finding
from gemma2tool.pipeline.checks.finding import CheckFinding
from gemma2tool.pipeline.scan.template import hostile
from gemma2tool.pipeline.template import render
from gemma2tool.storage.quoting import quoted

SYSTEM, QUESTION, ANSWER, SECOND = "You know rivers.", "How deep is it?", "Three fathoms.", "And in winter?"
Messages = Sequence[Mapping[str, str]]
_CONVERSATION: Messages = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": SECOND},
]

_TURN_MARK = re.compile(r"<\|[^|<>\s]{1,40}\|>|<(?:start|end)_of_turn>")
"""What turns are marked with. Other tags, such as <think>, are often meant as plain text."""

EQUAL_ROWS = 1e-3
"""Relative distance of two rows that no training has told apart: resizing gives added rows the same mean."""


@dataclass(frozen=True)
class _Template:
    """A chat template and the checkpoint that it belongs to."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    name: str
    text: str

    @property
    def where(self) -> str:
        return "chat template" if self.name == DEFAULT_TEMPLATE else f"chat template {quoted(self.name)}"

    def rendered(self, messages: Messages = _CONVERSATION, *, generation: bool = False) -> str:
        texts = {role: _special_text(self.tokenizer, role) for role in ("bos", "eos", "pad", "unk")}
        values: dict[str, object] = {f"{role}_token": text for role, text in texts.items()}
        values |= {"messages": messages, "add_generation_prompt": generation}
        return render(self.text, values, self.checkpoint.path.name)

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The tokens that are found whole in a text, by text."""
        return {added.content: token for token, added in self.tokenizer.added_tokens.items()}


def check_templates(checkpoint: Checkpoint) -> Iterator[CheckFinding]:
    try:
        tokenizer = checkpoint.tokenizer
    except InputRefused:
        return  # the tokenizer's check reports it
    yield from _two_templates(checkpoint, tokenizer)
    for name, text in tokenizer.chat_templates.items():
        danger = hostile(text)
        template = _Template(checkpoint, tokenizer, name, text)
        if danger is not None:
            yield finding("template.hostile", template.where, danger.message)
        elif name == DEFAULT_TEMPLATE:
            yield from _check(template)


def _two_templates(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Iterator[CheckFinding]:
    if checkpoint.assets.derived or "chat_template.jinja" not in checkpoint.assets:
        return
    other, own = _template_of_config(checkpoint), tokenizer.chat_template
    if other is not None and own is not None and other.strip() != own.strip():
        yield finding("template.two", "chat_template.jinja", "tokenizer_config.json has a different chat template")


def _template_of_config(checkpoint: Checkpoint) -> str | None:
    try:
        content = strict_json.load(
            checkpoint.assets["tokenizer_config.json"], what="tokenizer_config.json", max_bytes=MAX_JSON_BYTES
        )
    except (KeyError, InputRefused):
        return None
    return templates_of(content.get("chat_template")).get(DEFAULT_TEMPLATE) if isinstance(content, dict) else None


def _check(template: _Template) -> Iterator[CheckFinding]:
    try:
        closed, opened = template.rendered(), template.rendered(generation=True)
    except InputRefused as error:
        yield finding("template.broken", template.where, error.message)
        return
    lost = [text for text in (QUESTION, ANSWER, SECOND) if text not in closed]
    if lost:
        yield finding("template.text-lost", template.where, f"{quoted(lost[0])} is not in the rendered conversation")
    if opened == closed:
        yield finding("template.no-answer-turn", template.where, "add_generation_prompt changes nothing")
    yield from _system(template)
    yield from _turn_marks(template, opened)


def _system(template: _Template) -> Iterator[CheckFinding]:
    """Gemma's own template refuses a system message, others put it into the first turn: both are heard."""
    try:
        rendered = template.rendered([{"role": "system", "content": SYSTEM}, *_CONVERSATION])
    except InputRefused:
        return
    if SYSTEM not in rendered:
        yield finding("template.system-lost", template.where, "it silently drops a system message")


def _turn_marks(template: _Template, rendered: str) -> Iterator[CheckFinding]:
    if not template.tokenizer.has_vocabulary:
        return
    marks = dict.fromkeys(_TURN_MARK.findall(rendered))
    unknown = [mark for mark in marks if mark not in template.ids]
    if unknown:
        yield finding(
            "tokenizer.turn-marks",
            template.where,
            f"it writes {quoted(unknown[0])}, which is not one token of the tokenizer but several pieces of text",
        )
    known = [template.ids[mark] for mark in marks if mark in template.ids]
    yield from _untrained(template, known)
    yield from _stop_at_turn(template, rendered)


def _stop_at_turn(template: _Template, rendered: str) -> Iterator[CheckFinding]:
    """The mark after the answer must end a generation."""
    after = _TURN_MARK.search(rendered, rendered.rfind(ANSWER) + len(ANSWER)) if ANSWER in rendered else None
    token = template.ids.get(after[0]) if after else None
    stops = template.tokenizer.stops(template.checkpoint.config)
    if after and token is not None and token not in stops:
        yield finding(
            "tokenizer.stops",
            template.where,
            f"an answer ends with {quoted(after[0])}, {token}, at which generation does not stop: a chat runs on",
            remedy=f"add {token} to eos_token_id of generation_config.json",
        )


def _untrained(template: _Template, tokens: list[int]) -> Iterator[CheckFinding]:
    embedding = template.checkpoint.tensors.get(EMBEDDING)
    inside = [token for token in tokens if embedding is not None and token < embedding.rows]
    if embedding is None or not inside:
        return
    rows = {token: embedding.load_rows_f32(token, token + 1).astype(np.float64).reshape(-1) for token in inside}
    lengths = {token: float(np.linalg.norm(row)) for token, row in rows.items()}
    zero = [token for token in inside if lengths[token] == 0]
    equal = [
        (one, other)
        for place, one in enumerate(inside)
        for other in inside[:place]
        if lengths[one] > 0 and np.linalg.norm(rows[one] - rows[other]) < EQUAL_ROWS * lengths[one]
    ]
    if zero or equal:
        first, second = (zero[0], None) if zero else equal[0]
        text = quoted(template.tokenizer.text(first))
        what = "is zero" if second is None else f"equals that of {quoted(template.tokenizer.text(second))}"
        yield finding("tokenizer.untrained", template.where, f"the embedding row of {text} {what}")


def _special_text(tokenizer: Tokenizer, role: str) -> str:
    token = tokenizer.roles.get(role)
    added = None if token is None else tokenizer.added_tokens.get(token)
    return f"<{role}>" if added is None else added.content
