"""What servers say, in one form."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gemma2tool.engines.servers.talk import Answer


class Choice(NamedTuple):
    """A token and its log-probability (natural logarithm). ``token``: its id; None where only its ``text``, in UTF-8,
    is known. ``logprob``: None where the server does not say."""

    token: int | None
    text: bytes | None
    logprob: float | None


Position = Sequence[Choice]
"""The likeliest tokens at one position of a text, the likeliest first."""


@dataclass(frozen=True)
class Facts:
    """What a server says about itself and what it serves; None where it does not.

    ``name``: of the program, ``version``: its version. ``model``: as the server calls it. ``quantization``: the type of
    the weights, in the server's words. ``tensor_bytes``: size of the weights. ``parameters``, ``vocabulary``,
    ``width``: number of values, of tokens and of the model's dimensions. ``context``: tokens that a conversation may
    have. ``stops``: texts that end an answer. ``ignores_stops``: the defaults for its requests leave the stop tokens
    out. ``adapters``: names of adapters that are applied to every request.
    """

    name: str
    version: str = ""
    model: str = ""
    quantization: str | None = None
    tensor_bytes: int | None = None
    parameters: int | None = None
    vocabulary: int | None = None
    width: int | None = None
    context: int | None = None
    stops: tuple[str, ...] | None = None
    ignores_stops: bool = False
    adapters: tuple[str, ...] = ()

    @property
    def program(self) -> str:
        return f"{self.name} {self.version}".strip()


@dataclass(frozen=True)
class Prompt:
    """The beginning of a text: its token ids, with bos, and its text without."""

    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as a server gives it to the model: as text or as token ids, whichever it tells."""

    text: str | None = None
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Completion:
    """What a server wrote. ``positions``: the likeliest tokens at each position, ``tokens``: those it chose; both empty
    if it tells none. ``finish``: why it ended ("stop", "length"). ``prompt_tokens``, ``completion_tokens``: as it
    counts them."""

    text: str
    positions: tuple[Position, ...] = ()
    tokens: tuple[Choice, ...] = ()
    finish: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


_TOKEN_ID = re.compile(r"token_id:([0-9]{1,9})")


def choice(entry: Answer) -> Choice:
    """An object with ``token`` (its text, or ``token_id:N``), ``logprob``, and perhaps ``id`` and ``bytes``."""
    text = entry["token"].text(1 << 12)
    named = _TOKEN_ID.fullmatch(text)
    token = int(named[1]) if named else entry["id"].optional_integer()
    raw = entry["bytes"]
    spelled = (
        bytes(item.integer() & 0xFF for item in raw.items(1 << 12)) if raw.value else text.encode("utf-8", "replace")
    )
    return Choice(token, None if named else spelled, entry["logprob"].log_probability())


def positions_of(logprobs: Answer) -> Iterator[tuple[Choice, Position]]:
    """The chosen token and the likeliest ones at each position, from either form of OpenAI's ``logprobs``."""
    if logprobs["content"]:
        for entry in logprobs["content"].items():
            chosen = choice(entry)
            yield chosen, _ranked([choice(other) for other in entry["top_logprobs"].items()], chosen)
    elif logprobs["tokens"]:
        tops = logprobs["top_logprobs"]
        for index, token in enumerate(logprobs["tokens"].items()):
            chosen = _named(token.text(1 << 12), logprobs["token_logprobs"][index].log_probability())
            others = [_named(text, value.log_probability()) for text, value in tops[index].pairs()] if tops else []
            yield chosen, _ranked(others, chosen)


def _named(text: str, logprob: float) -> Choice:
    named = _TOKEN_ID.fullmatch(text)
    return Choice(int(named[1]), None, logprob) if named else Choice(None, text.encode("utf-8", "replace"), logprob)


def _ranked(choices: list[Choice], chosen: Choice) -> Position:
    choices = choices or [chosen]
    return sorted(choices, key=lambda choice: -(choice.logprob or 0.0))


def completion_of(answer: Answer) -> Completion:
    """An answer of ``/v1/completions`` or ``/v1/chat/completions``."""
    result = answer["choices"][0]
    message = result["message"]
    text = message["content"].optional_text() if message else result["text"].optional_text()
    pairs = list(positions_of(result["logprobs"])) if result["logprobs"] else []
    if not result:
        result.wrong("a choice")
    usage = answer["usage"]
    return Completion(
        text=text or "",
        positions=tuple(position for _, position in pairs),
        tokens=tuple(chosen for chosen, _ in pairs),
        finish=result["finish_reason"].optional_text(),
        prompt_tokens=usage["prompt_tokens"].optional_integer(),
        completion_tokens=usage["completion_tokens"].optional_integer(),
    )
