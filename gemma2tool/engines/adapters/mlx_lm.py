"""In its process: mlx-lm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import numpy as np

from gemma2tool.engines.adapters.transformers import tokenizer_messages
from gemma2tool.engines.library import imported
from gemma2tool.engines.messages import Message, sentence, serve


def answer(request: Mapping[str, Any]) -> Iterator[Message]:
    """The messages, see ``adapters``."""
    mlx_lm, library = imported("mlx-lm", lambda: import_module("mlx_lm"))
    yield library
    mx = import_module("mlx.core")
    mx.set_default_device(mx.cpu)
    try:
        model, tokenizer = mlx_lm.load(request["path"])[:2]
    except Exception as error:
        yield Message({"kind": "refused", "message": sentence(error)})
        return
    yield from tokenizer_messages(tokenizer, request)
    yield Message({"kind": "stops", "ids": sorted(int(token) for token in tokenizer.eos_token_ids)})
    cache = import_module("mlx_lm.models.cache").make_prompt_cache(model)
    outputs = model(mx.array([request["ids"]]), cache=cache)
    logits = np.ascontiguousarray(np.array(outputs[0, -request["positions"] :].astype(mx.float32)))
    yield Message({"kind": "logits", "shape": list(logits.shape)}, logits.tobytes())
    ids: list[int] = []
    while len(ids) < request["new_tokens"]:
        ids.append(int(mx.argmax(outputs[0, -1])))
        outputs = model(mx.array([ids[-1:]]), cache=cache)
    yield Message({"kind": "continuation", "ids": ids})


if __name__ == "__main__":
    serve(answer)
