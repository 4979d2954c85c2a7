"""In its process: transformers with eager attention, in float32 where the folder's scheme can be run in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from gemma2tool.engines.library import imported
from gemma2tool.engines.messages import Message, Unable, sentence, serve

_ATTENTION = "eager"
"""The attention that applies the soft cap on every machine."""


def answer(request: Mapping[str, Any]) -> Iterator[Message]:
    """The messages, see ``adapters``."""
    import torch

    transformers, library = imported("transformers", lambda: import_module("transformers"))
    yield library
    torch.set_num_threads(request["threads"])
    path = request["path"]
    try:
        model, info = _load(transformers, request, torch.float32)
    except ImportError as error:
        raise Unable(f"transformers needs another library for this type: {sentence(error)}") from error
    except Exception as error:
        yield Message({"kind": "refused", "message": sentence(error)})
        return
    yield Message({"kind": "loading", "problems": list(_problems(info))})
    yield from _tokenizer(transformers, path, request)
    stops = getattr(model.generation_config, "eos_token_id", None)
    yield Message({"kind": "stops", "ids": [stops] if isinstance(stops, int) else list(stops or ())})
    try:
        outputs = _run(model, request)
    except RuntimeError:
        if not request["quantized"]:
            raise
        # compressed-tensors unpacks microscaling types to bfloat16, which is not multiplied by float32
        model, _ = _load(transformers, request, torch.bfloat16)
        outputs = _run(model, request)
    logits = np.ascontiguousarray(outputs.logits[0].float().numpy())
    yield Message({"kind": "logits", "shape": list(logits.shape)}, logits.tobytes())
    yield Message({"kind": "continuation", "ids": _continuation(model, outputs, request["new_tokens"])})


def _load(transformers: ModuleType, request: Mapping[str, Any], dtype: Any) -> tuple[Any, Mapping[str, Any]]:
    """The model in ``dtype`` and what was said about loading it."""
    loaded: tuple[Any, Mapping[str, Any]] = transformers.AutoModelForCausalLM.from_pretrained(
        request["path"],
        dtype=dtype,
        attn_implementation=_ATTENTION,
        local_files_only=True,
        output_loading_info=True,
        **({"device_map": "cpu"} if request["quantized"] else {}),
    )
    return loaded


def _run(model: Any, request: Mapping[str, Any]) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor([request["ids"]]), logits_to_keep=request["positions"], use_cache=True)


def _continuation(model: Any, outputs: Any, count: int) -> list[int]:
    """The likeliest tokens after the prompt of ``outputs``, one by one from its cache."""
    import torch

    ids: list[int] = []
    while len(ids) < count:
        ids.append(int(outputs.logits[0, -1].argmax()))
        if len(ids) < count:
            with torch.no_grad():
                outputs = model(torch.tensor([ids[-1:]]), past_key_values=outputs.past_key_values, use_cache=True)
    return ids


def _problems(info: Mapping[str, Any]) -> Iterator[str]:
    for key, words in (
        ("missing_keys", "takes random values for what the folder lacks"),
        ("unexpected_keys", "ignores"),
        ("mismatched_keys", "takes random values for what has another shape"),
    ):
        names = sorted(str(name) for name in info.get(key, ()))
        if names:
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            yield f"{words}: {', '.join(names[:2])}{more}"


def _tokenizer(transformers: ModuleType, path: str, request: Mapping[str, Any]) -> Iterator[Message]:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        yield Message({"kind": "unable", "message": f"loads no tokenizer: {sentence(error)}"})
        return
    yield from tokenizer_messages(tokenizer, request)


def tokenizer_messages(tokenizer: Any, request: Mapping[str, Any]) -> Iterator[Message]:
    """Tokens and the template of a tokenizer of transformers."""
    ids = [[int(token) for token in tokenizer.encode(text)] for text in request["texts"]]
    yield Message({"kind": "tokens", "ids": ids})
    text = None
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(request["messages"], tokenize=False, add_generation_prompt=True)
    yield Message({"kind": "template", "text": text})


if __name__ == "__main__":
    serve(answer)
