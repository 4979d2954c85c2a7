"""In its process: keras-hub, on torch, in float32."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import numpy as np

from gemma2tool.engines.library import imported
from gemma2tool.engines.messages import Message, sentence, serve


def answer(request: Mapping[str, Any]) -> Iterator[Message]:
    """The messages, see ``adapters``."""
    os.environ["KERAS_BACKEND"] = "torch"

    keras_hub, library = imported("keras-hub", lambda: import_module("keras_hub"))
    yield library
    import torch

    torch.set_num_threads(request["threads"])
    try:
        backbone = keras_hub.models.GemmaBackbone.from_preset(request["path"], dtype="float32")
    except Exception as error:
        yield Message({"kind": "refused", "message": sentence(error)})
        return
    try:
        tokenizer = keras_hub.models.GemmaTokenizer.from_preset(request["path"])
        texts = [[int(token) for token in tokenizer(text)] for text in request["texts"]]
        start = [int(tokenizer.start_token_id)]  # GemmaCausalLMPreprocessor puts it before a text
        yield Message({"kind": "tokens", "ids": [start + ids for ids in texts]})
        stops = {int(tokenizer.end_token_id)}
        turn = tokenizer.token_to_id("<end_of_turn>")
        if turn != tokenizer.token_to_id("<unk>"):  # GemmaCausalLM's "auto"
            stops.add(int(turn))
        yield Message({"kind": "stops", "ids": sorted(stops)})
    except Exception as error:
        yield Message({"kind": "unable", "message": f"loads no tokenizer: {sentence(error)}"})
    model = keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)
    prompt, new_tokens = request["ids"], request["new_tokens"]
    ids = np.array([prompt])
    with torch.no_grad():
        hidden = backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)})[:, -request["positions"] :]
        outputs = backbone.token_embedding(hidden, reverse=True)  # with the soft cap
    logits = np.ascontiguousarray(outputs[0].float().cpu().numpy())
    yield Message({"kind": "logits", "shape": list(logits.shape)}, logits.tobytes())
    model.compile(sampler="greedy")
    padded = np.pad(ids, ((0, 0), (0, new_tokens)))
    mask = np.arange(padded.shape[1])[None] < len(prompt)
    generated = model.generate({"token_ids": padded, "padding_mask": mask}, stop_token_ids=None)["token_ids"]
    yield Message({"kind": "continuation", "ids": [int(token) for token in np.asarray(generated)[0, len(prompt) :]]})


if __name__ == "__main__":
    serve(answer)
