"""``python -m tests.support.llama_lora MODEL ADAPTER OUT``: llama.cpp's logits for a few tokens, with a LoRA adapter
unless ADAPTER is empty. A process of its own, because llama.cpp aborts where it does not fit.
"""

from __future__ import annotations

import ctypes as C
import sys
from typing import Any

import numpy as np

from gemma2tool.engines.adapters import xllamacpp_api
from gemma2tool.engines.adapters.llama_cpp import _context, _decode

IDS = [2, 17, 99, 4, 158, 31, 5, 6, 120, 77]
_POINTER = C.c_void_p


class _WithAdapter:
    """The library, whose contexts have the adapter."""

    def __init__(self, library: Any, model: Any, path: str) -> None:
        self._library = library
        library.llama_adapter_lora_init.restype = _POINTER
        library.llama_adapter_lora_init.argtypes = [_POINTER, C.c_char_p]
        library.llama_set_adapters_lora.argtypes = [_POINTER, C.POINTER(_POINTER), C.c_size_t, C.POINTER(C.c_float)]
        self._adapter = library.llama_adapter_lora_init(model, path.encode())
        assert self._adapter, f"llama.cpp does not load {path}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def llama_init_from_model(self, model: Any, params: Any) -> Any:
        context = self._library.llama_init_from_model(model, params)
        adapters, scales = (_POINTER * 1)(self._adapter), (C.c_float * 1)(1.0)
        assert self._library.llama_set_adapters_lora(context, adapters, 1, scales) == 0
        return context


def main(path: str, adapter: str, out: str) -> None:
    library = xllamacpp_api.load()
    library.llama_backend_init()
    params = library.llama_model_default_params()
    params.use_extra_bufts, params.n_gpu_layers = False, 0
    model = library.llama_model_load_from_file(path.encode(), params)
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    api = _WithAdapter(library, model, adapter) if adapter else library
    context = _context(api, model, {"ids": IDS, "new_tokens": 0, "threads": 1})
    logits = _decode(api, context, IDS, 0, len(IDS), size)
    assert logits is not None
    np.save(out, logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
