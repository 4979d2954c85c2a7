"""SGLang: ``/model_info``, ``/server_info``, ``/tokenize``, ``/generate`` with ``return_logprob``."""

from __future__ import annotations

from gemma2tool.engines.servers.answers import ChatPrompt, Choice, Facts, Position, Prompt
from gemma2tool.engines.servers.base import Conversation, Server
from gemma2tool.engines.servers.talk import Answer, first


class SGLang(Server):
    """Takes token ids as prompts, and tells the probabilities of a prompt's own tokens by its own protocol."""

    name = "SGLang"
    takes_ids = True
    top = 20
    top_chat = 20

    def facts(self) -> Facts:
        entry = self.models.get(self.model)
        info = first([self.talk.get("/server_info"), self.talk.get("/get_server_info")])
        context = entry["max_model_len"].optional_integer() if entry else None
        return Facts(
            self.name,
            version=(info["version"].optional_text() or "") if info else "",
            model=self.model,
            context=(info["context_length"].optional_integer() if info else None) or context,
        )

    def tokenize(self, text: str) -> tuple[int, ...] | None:
        answer = self.talk.optional("/tokenize", model=self.model, prompt=text, add_special_tokens=True)
        return None if answer is None else answer["tokens"].ids()

    def chat_prompt(self, messages: Conversation) -> ChatPrompt | None:
        return None

    def score(self, prompt: Prompt) -> tuple[Position, ...] | None:
        answer = self.talk.optional(
            "/generate",
            input_ids=list(prompt.ids),
            sampling_params={"max_new_tokens": 1, "temperature": 0},
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=self.top,
        )
        rows = answer["meta_info"]["input_top_logprobs"] if answer else None
        if not rows:
            return None
        return tuple(_position(row) for row in rows.items()[1:])


def _position(row: Answer) -> Position:
    """From triples of log-probability, id and text."""
    choices = [Choice(item[1].integer(), None, item[0].log_probability()) for item in row.items(1 << 12)]
    return sorted(choices, key=lambda choice: -(choice.logprob or 0.0))
