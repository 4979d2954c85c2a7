"""llama.cpp's C interface in the library of the xllamacpp wheel, by ctypes, under the names that llama-cpp-python gives
it.

The structures are those of llama.h of October 2026 (xllamacpp 2026.10). ``load`` compares the library's own defaults
with what these fields should say, so that another layout is noticed before it is used.
"""

from __future__ import annotations

import ctypes as C
import importlib.util
from contextlib import suppress
from pathlib import Path
from typing import Any

from gemma2tool.engines.messages import Unable

_FLAGS = "vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp"
_SIZES = "n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq"
_MODES = "ctx_type rope_scaling_type pooling_type attention_type flash_attn_type"
_ROPE = "rope_freq_base rope_freq_scale yarn_ext_factor yarn_attn_factor yarn_beta_fast yarn_beta_slow"
_CONTEXT_FLAGS = "embeddings offload_kqv no_perf op_offload swa_full kv_unified"


def _fields(names: str, kind: Any) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


_SPARE = ("spare", C.c_uint8 * 64)
"""Room for fields of a later version: the library writes a structure of its own size where it returns one."""


class ModelParams(C.Structure):
    """llama_model_params."""

    _fields_ = [
        *_fields("devices tensor_buft_overrides", C.c_void_p),
        ("n_gpu_layers", C.c_int32),
        *_fields("split_mode load_mode lazy_mode", C.c_int),
        ("main_gpu", C.c_int32),
        *_fields("tensor_split progress_callback progress_callback_user_data kv_overrides", C.c_void_p),
        *_fields(_FLAGS, C.c_bool),
        _SPARE,
    ]


class ContextParams(C.Structure):
    """llama_context_params."""

    _fields_ = [
        *_fields(_SIZES, C.c_uint32),
        *_fields("n_threads n_threads_batch", C.c_int32),
        *_fields(_MODES, C.c_int),
        *_fields(_ROPE, C.c_float),
        ("yarn_orig_ctx", C.c_uint32),
        ("defrag_thold", C.c_float),
        *_fields("cb_eval cb_eval_user_data", C.c_void_p),
        *_fields("type_k type_v", C.c_int),
        *_fields("abort_callback abort_callback_data unnamed", C.c_void_p),
        *_fields(_CONTEXT_FLAGS, C.c_bool),
        ("samplers", C.c_void_p),
        ("n_samplers", C.c_size_t),
        ("ctx_other", C.c_void_p),
        _SPARE,
    ]


class Batch(C.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", C.c_int32),
        ("token", C.POINTER(C.c_int32)),
        ("embd", C.c_void_p),
        ("pos", C.POINTER(C.c_int32)),
        ("n_seq_id", C.POINTER(C.c_int32)),
        ("seq_id", C.POINTER(C.POINTER(C.c_int32))),
        ("logits", C.POINTER(C.c_int8)),
    ]


class ChatMessage(C.Structure):
    """llama_chat_message."""

    _fields_ = _fields("role content", C.c_char_p)


LOG_CALLBACK = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)

_POINTER = C.c_void_p
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LOG_CALLBACK, _POINTER]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (_POINTER, [C.c_char_p, ModelParams]),
    "llama_init_from_model": (_POINTER, [_POINTER, ContextParams]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_vocab_n_tokens": (C.c_int32, [_POINTER]),
    "llama_vocab_is_eog": (C.c_bool, [_POINTER, C.c_int32]),
    "llama_tokenize": (
        C.c_int32,
        [_POINTER, C.c_char_p, C.c_int32, C.POINTER(C.c_int32), C.c_int32, C.c_bool, C.c_bool],
    ),
    "llama_model_chat_template": (C.c_char_p, [_POINTER, C.c_char_p]),
    "llama_chat_apply_template": (
        C.c_int32,
        [C.c_char_p, C.POINTER(ChatMessage), C.c_size_t, C.c_bool, C.c_char_p, C.c_int32],
    ),
    "llama_batch_init": (Batch, [C.c_int32, C.c_int32, C.c_int32]),
    "llama_decode": (C.c_int32, [_POINTER, Batch]),
    "llama_get_logits": (C.POINTER(C.c_float), [_POINTER]),
}


def load() -> Any:
    """The library, with typed functions. Raises ``ImportError`` where there is none, ``Unable`` for another layout."""
    spec = importlib.util.find_spec("xllamacpp")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = next((file for folder in folders for file in Path(folder).glob("xllamacpp*.so")), None)
    if path is None:
        raise ImportError("No module named 'xllamacpp'")
    with suppress(OSError):
        C.CDLL("libgomp.so.1", mode=C.RTLD_GLOBAL)
    library: Any = C.CDLL(str(path))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_chat_message = ChatMessage
    library.llama_log_callback = LOG_CALLBACK
    context, model = library.llama_context_default_params(), library.llama_model_default_params()
    expected = (512, 2048, 512, True, False, True)
    flags = (bool(context.offload_kqv), bool(context.embeddings), bool(model.use_extra_bufts))
    if (context.n_ctx, context.n_batch, context.n_ubatch, *flags) != expected:
        raise Unable("this version of xllamacpp has another interface; 2026.10 is known")
    return library
