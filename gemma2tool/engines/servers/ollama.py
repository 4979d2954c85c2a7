"""Ollama: ``/api/show``, ``/api/ps``, ``/api/generate`` with raw prompts and log-probabilities."""

from __future__ import annotations

import re

from gemma2tool.engines.servers.answers import Choice, Completion, Facts, Position, Prompt, choice
from gemma2tool.engines.servers.base import Server
from gemma2tool.engines.servers.talk import Answer

_STOP = re.compile(r'^stop\s+"?(.*?)"?\s*$', re.MULTILINE)


class Ollama(Server):
    """Takes prompts as text, before which it puts bos, and tells tokens by their texts, from version 0.12.11 on."""

    name = "Ollama"
    top = 20
    top_chat = 20

    def facts(self) -> Facts:
        version, shown = self.talk.get("/api/version"), self.talk.optional("/api/show", model=self.model)
        info = dict(shown["model_info"].pairs()) if shown and shown["model_info"] else {}
        parameters = shown["parameters"].optional_text() if shown else None
        return Facts(
            self.name,
            version=(version["version"].optional_text() or "") if version else "",
            model=self.model,
            quantization=shown["details"]["quantization_level"].optional_text() if shown else None,
            parameters=info["general.parameter_count"].optional_integer()
            if "general.parameter_count" in info
            else None,
            width=info["gemma2.embedding_length"].optional_integer() if "gemma2.embedding_length" in info else None,
            context=self._loaded_context(),
            stops=tuple(_STOP.findall(parameters)) if parameters else None,
        )

    def _loaded_context(self) -> int | None:
        running = self.talk.get("/api/ps")
        for entry in running["models"].items(1 << 10) if running and running["models"] else []:
            if self.model in (entry["name"].optional_text(), entry["model"].optional_text()):
                return entry["context_length"].optional_integer()
        return None

    def complete(self, prompt: Prompt, count: int) -> Completion:
        answer = self.talk.post(
            "/api/generate",
            model=self.model,
            prompt=prompt.text,
            raw=True,
            stream=False,
            logprobs=True,
            top_logprobs=self.top,
            options={"temperature": 0, "num_predict": count, "repeat_penalty": 1},
        )
        pairs = [_pair(entry) for entry in answer["logprobs"].items()] if answer["logprobs"] else []
        return Completion(
            text=answer["response"].text(),
            positions=tuple(position for _, position in pairs),
            tokens=tuple(entry for entry, _ in pairs),
            finish=answer["done_reason"].optional_text(),
            prompt_tokens=answer["prompt_eval_count"].optional_integer(),
            completion_tokens=answer["eval_count"].optional_integer(),
        )


def _pair(entry: Answer) -> tuple[Choice, Position]:
    chosen = choice(entry)
    others = [choice(other) for other in entry["top_logprobs"].items(64)] if entry["top_logprobs"] else [chosen]
    return chosen, sorted(others, key=lambda choice: -(choice.logprob or 0.0))
