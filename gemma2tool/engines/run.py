"""The engines by name, and what one of them makes of a checkpoint."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from gemma2tool.engines.messages import Message
from gemma2tool.engines.process import Limits, Witness
from gemma2tool.errors import UsageError, choices
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import Array

Conversation = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Engine:
    """A program that runs models.

    ``module``: of ``engines.adapters``. ``formats``: that it loads. ``needs``: sets of modules, one of which must be
    there; ``install``: what brings one. ``arithmetic``: what it computes in, in words. ``limits``: on the logits of
    unquantized weights, by the names of gates: how far that arithmetic takes them from float32. ``has_window``: whether
    it masks by the sliding window.
    """

    module: str
    formats: tuple[str, ...]
    needs: tuple[tuple[str, ...], ...]
    install: str
    arithmetic: str
    limits: Mapping[str, float] = field(default_factory=dict)
    has_window: bool = True


_FLOAT32 = MappingProxyType({"kl": 1e-5, "top1": 0.99})
"""Float32 engines differ by the order of additions: KL 1e-12. A faulty one exceeds this many times over."""

ENGINES: Mapping[str, Engine] = MappingProxyType(
    {
        "transformers": Engine(
            "transformers",
            ("hf", "hf-bin"),
            (("transformers", "torch"),),
            "pip install transformers accelerate",
            "float32; bfloat16 or 8-bit activations in the kernels of some quantized types",
            _FLOAT32,
        ),
        "llama.cpp": Engine(
            "llama_cpp",
            ("gguf",),
            (("llama_cpp",), ("xllamacpp",)),
            "pip install xllamacpp",
            "float32, with GELU from a float16 table and activations rounded to the weights' precision",
        ),
        "mlx-lm": Engine(
            "mlx_lm",
            ("mlx", "hf"),
            (("mlx", "mlx_lm"),),
            "pip install mlx-lm",
            "the type of the weights' scales or of the weights, mostly bfloat16; without a sliding window",
            has_window=False,
        ),
        "keras-hub": Engine(
            "keras_hub",
            ("keras",),
            (("keras", "keras_hub"),),
            "pip install keras-hub",
            "float32",
            _FLOAT32,
        ),
        "gemma": Engine(
            "google_gemma",
            ("flax",),
            (("gemma", "flax", "orbax", "sentencepiece"),),
            "pip install gemma",
            "float32",
            _FLOAT32,
        ),
    }
)

_GIGABYTE = 1 << 30
_TEXT_BYTES = 16 << 20


@dataclass(frozen=True)
class EngineAnswer:
    """What an engine makes of a checkpoint; None for what it does not say.

    ``version``: "transformers 5.23.0". ``problems``: remarks on loading. ``refused``: why it does not run the model.
    ``tokens``: ids of each text. ``has_template``, ``template``: the conversation as it writes it. ``stops``: ids that
    end an answer. ``logits``: float32 (positions, V). ``continuation``: ids that it generates greedily after the
    prompt. ``unable``: what it cannot do here.
    """

    version: str
    problems: tuple[str, ...] = ()
    refused: str | None = None
    tokens: tuple[tuple[int, ...], ...] | None = None
    has_template: bool = False
    template: str | None = None
    stops: frozenset[int] | None = None
    logits: Array | None = None
    continuation: tuple[int, ...] | None = None
    unable: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineQuestion:
    """What an engine is asked. ``ids``: a prompt; ``positions``: of how many of its last positions logits are returned.
    ``texts``: to be tokenized. ``messages``: a conversation. ``new_tokens``: how many tokens to generate after the
    prompt, greedily and whatever they are."""

    ids: Sequence[int]
    positions: int
    texts: Sequence[str]
    messages: Conversation
    new_tokens: int = 0
    threads: int = 1


def engine_for(name: str, format_name: str) -> Engine:
    """The engine ``name``. Raises ``UsageError`` if it is unknown, not installed, or does not load the format."""
    engine = ENGINES.get(name)
    if engine is None:
        raise UsageError("engine.unknown", f"{name!r} is not an engine", hint=choices.hint(name, list(ENGINES)))
    if format_name not in engine.formats:
        others = [other for other, row in ENGINES.items() if format_name in row.formats]
        hint = f"engines that do: {', '.join(others)}" if others else f"convert it to {engine.formats[0]} first"
        raise UsageError("engine.format", f"{name} does not load the format {format_name}", hint=hint)
    if not any(all(importlib.util.find_spec(module) for module in modules) for modules in engine.needs):
        raise UsageError("engine.missing", f"{name} is not installed", hint=engine.install)
    return engine


def ask(engine: Engine, checkpoint: Checkpoint, question: EngineQuestion) -> EngineAnswer:
    """Run the engine on the checkpoint's files, in a process of its own."""
    logits_bytes = 4 * question.positions * checkpoint.config.vocab_size
    size = checkpoint.file_bytes
    limits = Limits(
        wall_seconds=600 + size // (10 << 20),
        grace_seconds=60,
        cpu_seconds=24 * 3600,
        data_bytes=32 * _GIGABYTE + 8 * size,
        answer_bytes=logits_bytes + _TEXT_BYTES,
    )
    path: Path = checkpoint.files[0] if engine.module == "llama_cpp" else checkpoint.path
    request = {
        "path": str(path if path.is_dir() or engine.module == "llama_cpp" else path.parent),
        "ids": [int(token) for token in question.ids],
        "positions": question.positions,
        "texts": list(question.texts),
        "messages": [dict(message) for message in question.messages],
        "new_tokens": question.new_tokens,
        "config": checkpoint.config.to_hf(),
        "quantized": checkpoint.is_quantized,
        "threads": question.threads,
    }
    module = f"gemma2tool.engines.adapters.{engine.module}"
    with Witness(module, request, limits, threads=question.threads) as witness:
        return _answer(*witness.answer())


def _answer(messages: Iterable[Message], problem: str | None) -> EngineAnswer:
    content: dict[str, Mapping[str, Any]] = {}
    unable: list[str] = []
    logits = None
    for message in messages:
        kind = str(message.content.get("kind"))
        if kind == "unable":
            unable.append(str(message.content["message"]))
        content[kind] = message.content
        if kind == "logits":
            logits = np.frombuffer(message.payload, np.float32).reshape(message.content["shape"])
    library = content.get("library", {"name": "the engine", "version": ""})
    refused = str(content["refused"]["message"]) if "refused" in content else problem
    tokens = content.get("tokens")
    return EngineAnswer(
        version=f"{library['name']} {library['version']}".strip(),
        problems=tuple(content.get("loading", {}).get("problems", ())),
        refused=refused,
        tokens=None if tokens is None else tuple(tuple(ids) for ids in tokens["ids"]),
        has_template="template" in content,
        template=content.get("template", {}).get("text"),
        stops=frozenset(content["stops"]["ids"]) if "stops" in content else None,
        logits=logits,
        continuation=tuple(content["continuation"]["ids"]) if "continuation" in content else None,
        unable=tuple(unable),
    )
