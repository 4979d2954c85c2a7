"""In its process: llama.cpp, from llama-cpp-python or xllamacpp, whichever is installed. On the CPU, with a float32
key-value cache and without flash attention, for the least noise.

``use_extra_bufts`` stays off: weights rearranged for AMX crash on machines that advertise it and do not have it.
"""

from __future__ import annotations

import ctypes as C
import importlib.util
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import numpy as np

from gemma2tool.engines.adapters import xllamacpp_api
from gemma2tool.engines.library import imported
from gemma2tool.engines.messages import Message, serve

_ERROR = 4
"""GGML_LOG_LEVEL_ERROR."""
_F32 = 0


def answer(request: Mapping[str, Any]) -> Iterator[Message]:
    """The messages, see ``adapters``."""
    api, library = _api()
    yield library
    errors: list[str] = []

    def on_log(level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            errors.append(text.decode("utf-8", "replace").strip())

    callback = api.llama_log_callback(on_log)
    api.llama_log_set(callback, None)
    api.llama_backend_init()
    params = api.llama_model_default_params()
    params.use_extra_bufts, params.n_gpu_layers = False, 0
    model = api.llama_model_load_from_file(request["path"].encode("utf-8", "surrogateescape"), params)
    if not model:
        yield Message({"kind": "refused", "message": _reason(errors)})
        return
    vocabulary = api.llama_model_get_vocab(model)
    size = int(api.llama_vocab_n_tokens(vocabulary))
    yield Message({"kind": "tokens", "ids": [_tokens(api, vocabulary, text) for text in request["texts"]]})
    yield _template(api, model, request["messages"])
    yield Message({"kind": "stops", "ids": [i for i in range(size) if api.llama_vocab_is_eog(vocabulary, i)]})
    context = _context(api, model, request)
    logits = _decode(api, context, request["ids"], 0, request["positions"], size) if context else None
    if logits is None:
        yield Message({"kind": "refused", "message": _reason(errors)})
        return
    yield Message({"kind": "logits", "shape": list(logits.shape)}, logits.tobytes())
    yield Message({"kind": "continuation", "ids": _continuation(api, context, logits[-1], request)})


def _api() -> tuple[Any, Message]:
    """The C interface, and the ``library`` message."""
    if importlib.util.find_spec("llama_cpp") is None:
        return imported("xllamacpp", xllamacpp_api.load)
    return imported("llama-cpp-python", lambda: import_module("llama_cpp"))


def _reason(errors: list[str]) -> str:
    """The first error that llama.cpp logs says more than the last, which is that it failed."""
    return errors[0][:300] if errors else "no reason given"


def _tokens(api: Any, vocabulary: Any, text: str) -> list[int]:
    """With bos and parsed special tokens, as llama.cpp's programs take a prompt."""
    raw = text.encode("utf-8", "surrogatepass")
    buffer = (C.c_int32 * (len(raw) + 16))()
    count = api.llama_tokenize(vocabulary, raw, len(raw), buffer, len(buffer), True, True)
    return list(buffer[: max(count, 0)])


def _template(api: Any, model: Any, messages: list[Mapping[str, str]]) -> Message:
    """The conversation by llama.cpp's own form of the file's template."""
    template = api.llama_model_chat_template(model, None)
    if not template:
        return Message({"kind": "template", "text": None})
    chat = (api.llama_chat_message * len(messages))()
    for item, message in zip(chat, messages, strict=True):
        item.role, item.content = message["role"].encode(), message["content"].encode()
    buffer = C.create_string_buffer(1 << 16)
    count = api.llama_chat_apply_template(template, chat, len(messages), True, buffer, len(buffer))
    if not 0 <= count <= len(buffer):
        return Message({"kind": "unable", "message": "knows no built-in form of the file's chat template"})
    return Message({"kind": "template", "text": buffer.raw[:count].decode("utf-8", "replace")})


def _context(api: Any, model: Any, request: Mapping[str, Any]) -> Any:
    """A context for the prompt and what is generated after it; a null pointer if there is none."""
    length = len(request["ids"]) + request["new_tokens"]
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(256, -(-length // 256) * 256)
    params.n_threads = params.n_threads_batch = request["threads"]
    params.type_k = params.type_v = _F32
    params.flash_attn_type = 0
    return api.llama_init_from_model(model, params)


def _decode(
    api: Any, context: Any, ids: list[int], first: int, positions: int, size: int
) -> np.ndarray[Any, Any] | None:
    """Float32 (positions, V) of the last of ``ids``, which follow ``first`` others; None if the pass fails."""
    batch = api.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, first + i, 1
        batch.logits[i] = i >= len(ids) - positions
        batch.seq_id[i][0] = 0
    if api.llama_decode(context, batch):
        return None
    return np.ctypeslib.as_array(api.llama_get_logits(context), (positions, size)).copy()


def _continuation(api: Any, context: Any, last: np.ndarray[Any, Any], request: Mapping[str, Any]) -> list[int]:
    """The likeliest tokens after the prompt, whose last logits are ``last`` (V,), one by one from the cache."""
    ids: list[int] = []
    while len(ids) < request["new_tokens"]:
        ids.append(int(last.argmax()))
        logits = _decode(api, context, ids[-1:], len(request["ids"]) + len(ids) - 1, 1, len(last))
        if logits is None:
            break
        last = logits[0]
    return ids


if __name__ == "__main__":
    serve(answer)
