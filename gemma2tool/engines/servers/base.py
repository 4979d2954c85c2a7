"""What all servers share: OpenAI's protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from gemma2tool.engines.servers.answers import ChatPrompt, Completion, Facts, Position, Prompt, completion_of
from gemma2tool.engines.servers.talk import Answer, Talk

Conversation = Sequence[Mapping[str, str]]
FORCED = 100
"""The largest bias that OpenAI's protocol has: a token with it is chosen whatever the model computes."""


class Server:
    """A server that speaks OpenAI's protocol and tells nothing more.

    ``model``: as requests name it. ``takes_ids``: prompts may be token ids. ``top``: alternatives that it can be asked
    for at each position. ``ids_as_text``: it can be asked to name tokens by their ids.
    """

    name: ClassVar[str] = "the server"
    takes_ids: ClassVar[bool] = False
    top: ClassVar[int] = 5
    top_chat: ClassVar[int] = 20

    def __init__(self, talk: Talk, models: Mapping[str, Answer], model: str) -> None:
        self.talk, self.models, self.model = talk, models, model

    def facts(self) -> Facts:
        entry = self.models.get(self.model)
        return Facts(self.name, model=self.model, context=entry["max_model_len"].optional_integer() if entry else None)

    def tokenize(self, text: str) -> tuple[int, ...] | None:
        """The ids of a prompt, with what the server puts before it; None if it does not tell."""
        return None

    def chat_prompt(self, messages: Conversation) -> ChatPrompt | None:
        """What it makes of a conversation; None if it does not tell."""
        return None

    def score(self, prompt: Prompt) -> tuple[Position, ...] | None:
        """The likeliest tokens after each token of a prompt but the last; None if it does not tell."""
        return None

    def complete(self, prompt: Prompt, count: int) -> Completion:
        """Up to ``count`` tokens after a prompt, the likeliest each time."""
        return completion_of(
            self.talk.post(
                "/v1/completions",
                model=self.model,
                prompt=list(prompt.ids) if self.takes_ids else prompt.text,
                max_tokens=count,
                temperature=0,
                logprobs=self.top,
                stream=False,
                **self.more(),
            )
        )

    def chat(self, messages: Conversation, count: int, forced: int | None = None) -> Completion | None:
        """Up to ``count`` tokens of an answer, the likeliest each time; ``forced``: an id that is chosen instead, by a
        bias. None if the server cannot do this."""
        answer = self.talk.optional(
            "/v1/chat/completions",
            model=self.model,
            messages=[dict(message) for message in messages],
            max_tokens=count,
            temperature=0,
            stream=False,
            **({"logprobs": True, "top_logprobs": self.top_chat} if forced is None else {}),
            logit_bias=None if forced is None else {str(forced): FORCED},
            **self.more(),
        )
        return None if answer is None else completion_of(answer)

    def more(self) -> dict[str, Any]:
        """Fields of every request."""
        return {}
