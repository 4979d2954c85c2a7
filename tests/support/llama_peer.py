"""ggml's own quantizers, from the xllamacpp wheel by ctypes: the reference for gemma2tool's kernels."""

from __future__ import annotations

import contextlib
import ctypes as C
import functools
import importlib.util
import pathlib

import numpy as np

from gemma2tool.quantizers.gguf_types import GGUF_TYPES


class _Traits(C.Structure):
    """The head of ggml_type_traits."""

    _fields_ = [
        ("type_name", C.c_char_p),
        ("block_elements", C.c_int64),
        ("interleave", C.c_int64),
        ("block_bytes", C.c_size_t),
        ("is_quantized", C.c_bool),
        ("to_float", C.CFUNCTYPE(None, C.c_void_p, C.c_void_p, C.c_int64)),
    ]


def available() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


@functools.cache
def _ggml() -> C.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    path = next(pathlib.Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"))
    with contextlib.suppress(OSError):
        C.CDLL("libgomp.so.1", mode=C.RTLD_GLOBAL)
    ggml = C.CDLL(str(path))
    ggml.ggml_quantize_chunk.restype = C.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [C.c_int, C.c_void_p, C.c_void_p, C.c_int64, C.c_int64, C.c_int64, C.c_void_p]
    ggml.ggml_get_type_traits.restype = C.POINTER(_Traits)
    ggml.ggml_get_type_traits.argtypes = [C.c_int]
    ggml.llama_backend_init()
    return ggml


def sizes(type: str) -> tuple[int, int]:
    """Elements and bytes of a block."""
    traits = _ggml().ggml_get_type_traits(GGUF_TYPES[type].id).contents
    return traits.block_elements, traits.block_bytes


def quantize(
    type: str, rows: np.ndarray, importance: np.ndarray | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """``ggml_quantize_chunk``: (n, cols) float32 to (n, bytes) uint8."""
    rows = np.ascontiguousarray(rows, np.float32)
    n, cols = rows.shape
    elements, block = sizes(type)
    if out is None:
        out = np.zeros((n, cols // elements * block), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    address = None if weights is None else weights.ctypes.data
    size = _ggml().ggml_quantize_chunk(GGUF_TYPES[type].id, rows.ctypes.data, out.ctypes.data, 0, n, cols, address)
    assert size == out.nbytes, (type, size, out.nbytes)
    return out


def dequantize(type: str, codes: np.ndarray, cols: int, out: np.ndarray | None = None) -> np.ndarray:
    """ggml's ``to_float``: (n, bytes) uint8 to (n, cols) float32."""
    codes = np.ascontiguousarray(codes)
    if out is None:
        out = np.zeros((codes.shape[0], cols), np.float32)
    _ggml().ggml_get_type_traits(GGUF_TYPES[type].id).contents.to_float(codes.ctypes.data, out.ctypes.data, out.size)
    return out
