"""llama-server of llama.cpp: ``/props``, ``/tokenize``, ``/apply-template``."""

from __future__ import annotations

from gemma2tool.engines.servers.answers import ChatPrompt, Facts
from gemma2tool.engines.servers.base import Conversation, Server


class LlamaCpp(Server):
    """Takes token ids as prompts, tells tokens with their ids, and any number of alternatives."""

    name = "llama.cpp"
    takes_ids = True
    top = 256
    top_chat = 256

    def facts(self) -> Facts:
        entry, props = self.models.get(self.model), self.talk.get("/props")
        meta = entry["meta"] if entry else None
        settings = props["default_generation_settings"] if props else None
        params = settings["params"] if settings else None
        lora = params["lora"] if params else None
        return Facts(
            self.name,
            version=(props["build_info"].optional_text() or "") if props else "",
            model=self.model,
            quantization=(props["model_ftype"].optional_text() if props else None)
            or (meta["ftype"].optional_text() if meta else None),
            tensor_bytes=meta["size"].optional_integer() if meta else None,
            parameters=meta["n_params"].optional_integer() if meta else None,
            vocabulary=meta["n_vocab"].optional_integer() if meta else None,
            width=meta["n_embd"].optional_integer() if meta else None,
            context=settings["n_ctx"].optional_integer() if settings else None,
            ignores_stops=params["ignore_eos"].value is True if params else False,
            adapters=tuple(_adapter(item["path"].optional_text(), item["id"].value) for item in lora.items(64))
            if lora
            else (),
        )

    def tokenize(self, text: str) -> tuple[int, ...] | None:
        answer = self.talk.optional("/tokenize", content=text, add_special=True, parse_special=True)
        return None if answer is None else answer["tokens"].ids()

    def chat_prompt(self, messages: Conversation) -> ChatPrompt | None:
        answer = self.talk.optional("/apply-template", messages=[dict(message) for message in messages])
        return None if answer is None else ChatPrompt(text=answer["prompt"].text())


def _adapter(path: str | None, number: object) -> str:
    return path or f"adapter {number}"
