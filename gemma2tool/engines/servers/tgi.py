"""Text Generation Inference: ``/info``, ``/tokenize``, ``/chat_tokenize``, ``/generate`` with details."""

from __future__ import annotations

from gemma2tool.engines.servers.answers import ChatPrompt, Choice, Completion, Facts, Prompt
from gemma2tool.engines.servers.base import Conversation, Server
from gemma2tool.engines.servers.talk import Answer


class TGI(Server):
    """Takes prompts as text, before which it puts bos, and tells tokens with their ids."""

    name = "TGI"
    top = 5
    top_chat = 5

    def facts(self) -> Facts:
        info = self.talk.get("/info")
        return Facts(
            self.name,
            version=(info["version"].optional_text() or "") if info else "",
            model=self.model,
            context=info["max_total_tokens"].optional_integer() if info else None,
        )

    def tokenize(self, text: str) -> tuple[int, ...] | None:
        answer = self.talk.optional("/tokenize", inputs=text)
        return None if answer is None else tuple(item["id"].integer() for item in answer.items())

    def chat_prompt(self, messages: Conversation) -> ChatPrompt | None:
        answer = self.talk.optional(
            "/chat_tokenize", model=self.model, messages=[dict(message) for message in messages]
        )
        if answer is None:
            return None
        ids = tuple(item["id"].integer() for item in answer["tokenize_response"].items())
        return ChatPrompt(text=answer["templated_text"].text(), ids=ids)

    def complete(self, prompt: Prompt, count: int) -> Completion:
        parameters = {"max_new_tokens": count, "details": True, "top_n_tokens": self.top, "do_sample": False}
        answer = self.talk.post("/generate", inputs=prompt.text, parameters=parameters)
        details = answer["details"]
        tokens = tuple(_choice(item) for item in details["tokens"].items())
        tops = details["top_tokens"]
        rows = [[_choice(item) for item in row.items(64)] for row in tops.items()] if tops else []
        positions = [sorted(row, key=lambda choice: -(choice.logprob or 0.0)) for row in rows]
        return Completion(
            text=answer["generated_text"].text(),
            positions=tuple(positions if len(positions) == len(tokens) else [[token] for token in tokens]),
            tokens=tokens,
            finish="length" if details["finish_reason"].optional_text() == "length" else "stop",
            completion_tokens=details["generated_tokens"].optional_integer(),
        )


def _choice(item: Answer) -> Choice:
    text = item["text"].text(1 << 12).encode("utf-8", "replace")
    return Choice(item["id"].integer(), text, item["logprob"].log_probability())
