"""Which program a server is, and which of its models is meant."""

from __future__ import annotations

from collections.abc import Mapping

from gemma2tool.engines.servers.base import Server
from gemma2tool.engines.servers.llama_cpp import LlamaCpp
from gemma2tool.engines.servers.lm_studio import LMStudio
from gemma2tool.engines.servers.ollama import Ollama
from gemma2tool.engines.servers.sglang import SGLang
from gemma2tool.engines.servers.talk import Answer, Exchange, Talk
from gemma2tool.engines.servers.tgi import TGI
from gemma2tool.engines.servers.vllm import VLLM
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.storage.quoting import quoted

_OWNERS: Mapping[str, type[Server]] = {
    "llamacpp": LlamaCpp,
    "vllm": VLLM,
    "sglang": SGLang,
    "organization_owner": LMStudio,
}
"""Who owns a model, by the list of models of each program."""
_MAX_MODELS = 1 << 12
_SHOWN = 6


def connect(endpoint: Exchange, model: str | None = None) -> Server:
    """The server at the other end. ``model``: which one of its models; needed if it has several.

    Raises ``UsageError`` (``server.model``) if it has several and none is named, or not the one that is; what
    ``Endpoint.exchange`` raises; ``InputRefused`` (``server.answer``) for a server without a list of models.
    """
    talk = Talk(endpoint)
    listed = talk.get("/v1/models")
    if listed is None or not listed["data"]:
        raise InputRefused("server.answer", f"{talk.where}/v1/models: there is no list of models")
    models = {entry["id"].text(1 << 10): entry for entry in listed["data"].items(_MAX_MODELS)}
    name = _chosen(talk.where, models, model)
    return _kind(talk, models.get(name))(talk, models, name)


def _kind(talk: Talk, entry: Answer | None) -> type[Server]:
    owner = entry["owned_by"].optional_text() if entry else None
    if owner is not None and owner in _OWNERS:
        return _OWNERS[owner]
    if (version := talk.get("/api/version")) and version["version"].optional_text():
        return Ollama
    if (info := talk.get("/info")) and info["max_total_tokens"] and info["model_id"]:
        return TGI
    if (props := talk.get("/props")) and props["default_generation_settings"]:
        return LlamaCpp
    return Server


def _chosen(where: str, models: Mapping[str, Answer], model: str | None) -> str:
    names = list(models)
    if model is not None:
        matches = [name for name in names if name in (model, f"{model}:latest")]
        aliased = [name for name in names if model in _aliases(models[name])]
        if not matches and not aliased:
            raise UsageError("server.model", f"{where} has no model {model!r}", hint=_hint(names))
        return (matches or aliased)[0]
    if len(names) != 1:
        message = f"{where} has {len(names)} models" if names else f"{where} has no model loaded"
        raise UsageError("server.model", message, hint=_hint(names))
    return names[0]


def _aliases(entry: Answer) -> list[object]:
    aliases = entry["aliases"]
    return [item.value for item in aliases.items(64)] if aliases else []


def _hint(names: list[str]) -> str:
    if not names:
        return "load the model into it first"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"name one with --server-model: {', '.join(quoted(name, 80) for name in names[:_SHOWN])}{more}"
