"""LM Studio: ``/api/v0/models`` beside OpenAI's protocol, without log-probabilities of completions."""

from __future__ import annotations

from typing import Any

from gemma2tool.engines.servers.answers import Facts
from gemma2tool.engines.servers.base import Server


class LMStudio(Server):
    """Takes prompts as text, before which it puts bos."""

    name = "LM Studio"

    def facts(self) -> Facts:
        listed = self.talk.get("/api/v0/models")
        for entry in listed["data"].items(1 << 12) if listed and listed["data"] else []:
            if entry["id"].optional_text() == self.model:
                return Facts(
                    self.name,
                    model=self.model,
                    quantization=entry["quantization"].optional_text(),
                    context=entry["loaded_context_length"].optional_integer(),
                )
        return Facts(self.name, model=self.model)

    def more(self) -> dict[str, Any]:
        return {"repeat_penalty": 1}  # the default, 1.1, makes it choose other tokens than the likeliest
