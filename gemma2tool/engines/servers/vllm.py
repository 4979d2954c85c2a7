"""vLLM: ``/tokenize``, ``/version``, ``prompt_logprobs``."""

from __future__ import annotations

from typing import Any

from gemma2tool.engines.servers.answers import ChatPrompt, Choice, Facts, Position, Prompt
from gemma2tool.engines.servers.base import Conversation, Server
from gemma2tool.engines.servers.talk import Answer


class VLLM(Server):
    """Takes token ids as prompts, and tells the probabilities of a prompt's own tokens."""

    name = "vLLM"
    takes_ids = True
    top = 20
    top_chat = 20

    def facts(self) -> Facts:
        entry, version = self.models.get(self.model), self.talk.get("/version")
        parent = entry["parent"].optional_text() if entry else None
        return Facts(
            self.name,
            version=(version["version"].optional_text() or "") if version else "",
            model=self.model,
            context=entry["max_model_len"].optional_integer() if entry else None,
            adapters=(self.model,) if parent else (),
        )

    def tokenize(self, text: str) -> tuple[int, ...] | None:
        answer = self.talk.optional("/tokenize", model=self.model, prompt=text, add_special_tokens=True)
        return None if answer is None else answer["tokens"].ids()

    def chat_prompt(self, messages: Conversation) -> ChatPrompt | None:
        answer = self.talk.optional(
            "/tokenize",
            model=self.model,
            messages=[dict(message) for message in messages],
            add_generation_prompt=True,
            add_special_tokens=False,
        )
        return None if answer is None else ChatPrompt(ids=answer["tokens"].ids())

    def score(self, prompt: Prompt) -> tuple[Position, ...] | None:
        answer = self.talk.optional(
            "/v1/completions",
            model=self.model,
            prompt=list(prompt.ids),
            max_tokens=1,
            temperature=0,
            prompt_logprobs=self.top,
            stream=False,
        )
        rows = answer["choices"][0]["prompt_logprobs"] if answer else None
        if not rows:
            return None
        return tuple(_position(row) for row in rows.items()[1:])  # the first token has no probability

    def more(self) -> dict[str, Any]:
        return {"return_tokens_as_token_ids": True}


def _position(row: Answer) -> Position:
    choices = []
    for key, value in row.pairs():
        if not key.isdigit() or len(key) > 9:
            value.wrong("of a token id")
        choices.append(Choice(int(key), None, value["logprob"].log_probability()))
    return sorted(choices, key=lambda choice: -(choice.logprob or 0.0))
