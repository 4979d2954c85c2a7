"""The GGUF block types: sizes, and quantization and dequantization of rows, byte for byte as in llama.cpp's x86-64
builds.

Rows are independent, so splitting a tensor into chunks of rows does not change a byte. A call runs on one thread
without the GIL; callers run chunks in parallel. Block layouts and type ids are from ggml (ggml-common.h, ggml.h).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import ml_dtypes
import numpy as np

from gemma2tool.model.lazy import Array
from gemma2tool.quantizers.casts import cast
from gemma2tool.quantizers.kernels import _native


@dataclass(frozen=True)
class GGUFType:
    """A GGUF tensor type.

    ``id``: ggml's number for the type. ``block_elements`` consecutive elements of a row take ``block_bytes`` bytes.
    ``takes_importance``: an importance matrix changes the codes. ``needs_importance``: llama.cpp refuses the type
    without one.
    """

    name: str
    id: int
    block_elements: int
    block_bytes: int
    takes_importance: bool = False
    needs_importance: bool = False

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_elements


_ROWS = (
    GGUFType("F32", 0, 1, 4),
    GGUFType("F16", 1, 1, 2),
    GGUFType("Q4_0", 2, 32, 18, takes_importance=True),
    GGUFType("Q4_1", 3, 32, 20, takes_importance=True),
    GGUFType("Q5_0", 6, 32, 22, takes_importance=True),
    GGUFType("Q5_1", 7, 32, 24, takes_importance=True),
    GGUFType("Q8_0", 8, 32, 34),
    GGUFType("Q2_K", 10, 256, 84, takes_importance=True),
    GGUFType("Q3_K", 11, 256, 110, takes_importance=True),
    GGUFType("Q4_K", 12, 256, 144, takes_importance=True),
    GGUFType("Q5_K", 13, 256, 176, takes_importance=True),
    GGUFType("Q6_K", 14, 256, 210, takes_importance=True),
    GGUFType("IQ2_XXS", 16, 256, 66, takes_importance=True, needs_importance=True),
    GGUFType("IQ2_XS", 17, 256, 74, takes_importance=True, needs_importance=True),
    GGUFType("IQ3_XXS", 18, 256, 98, takes_importance=True),
    GGUFType("IQ1_S", 19, 256, 50, takes_importance=True, needs_importance=True),
    GGUFType("IQ4_NL", 20, 32, 18, takes_importance=True),
    GGUFType("IQ3_S", 21, 256, 110, takes_importance=True),
    GGUFType("IQ2_S", 22, 256, 82, takes_importance=True),
    GGUFType("IQ4_XS", 23, 256, 136, takes_importance=True),
    GGUFType("IQ1_M", 29, 256, 56, takes_importance=True),
    GGUFType("BF16", 30, 1, 2),
    GGUFType("TQ1_0", 34, 256, 54),
    GGUFType("TQ2_0", 35, 256, 66),
    GGUFType("MXFP4", 39, 32, 17),
    GGUFType("NVFP4", 40, 64, 36),
    GGUFType("Q1_0", 41, 128, 18),
    GGUFType("Q2_0", 42, 64, 18),
)

GGUF_TYPES: Mapping[str, GGUFType] = MappingProxyType({row.name: row for row in _ROWS})

_OTHER_ROWS = (
    GGUFType("Q8_1", 9, 32, 36),  # gguf-py 0.19 has 40, from before its scales became float16
    GGUFType("Q8_K", 15, 256, 292),
    GGUFType("I8", 24, 1, 1),
    GGUFType("I16", 25, 1, 2),
    GGUFType("I32", 26, 1, 4),
    GGUFType("I64", 27, 1, 8),
    GGUFType("F64", 28, 1, 8),
)
"""Types that a GGUF file may have and that are neither read nor written. The numbers that are missing
were withdrawn.
"""

GGML_BLOCKS: Mapping[int, tuple[int, int]] = MappingProxyType(
    {row.id: (row.block_elements, row.block_bytes) for row in (*_ROWS, *_OTHER_ROWS)}
)
"""Every type of ggml by its number: (elements, bytes) per block."""

UNREAD_TYPES: Mapping[int, str] = MappingProxyType(
    {
        **dict.fromkeys((4, 5), "Q4_2 or Q4_3, withdrawn by ggml"),
        **dict.fromkeys((31, 32, 33, 36, 37, 38), "a repacked Q4_0 or IQ4_NL, withdrawn by ggml"),
        **{
            number: f"{name} of ik_llama.cpp"
            for number, name in {
                133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K",
                141: "IQ6_K", 144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS", 152: "IQ5_KS", 153: "IQ2_KT",
                154: "IQ3_KT", 155: "IQ4_KT", 156: "IQ3_KS", 157: "IQ2_KL", 158: "IQ1_KT",
            }.items()
        },
        **dict.fromkeys(range(200, 400), "a row-interleaved type of ik_llama.cpp"),
    }
)  # fmt: skip
"""Tensor types of forks and of the past by their numbers in files, for messages."""

_FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def row_bytes(type: str, cols: int) -> int:
    """How many bytes a row of ``cols`` elements takes.

    Raises:
        ValueError: for an unknown type, or ``cols`` that is not a positive multiple of the type's block.
    """
    row = _type(type)
    if cols <= 0 or cols % row.block_elements:
        raise ValueError(f"{type} requires rows of a multiple of {row.block_elements} elements, not {cols}")
    return cols // row.block_elements * row.block_bytes


def quantize(type: str, rows: Array, importance: Array | None = None, out: Array | None = None) -> Array:
    """Quantize float32 rows (n, cols) to blocks, uint8 (n, row_bytes): the bytes of ggml_quantize_chunk.

    ``importance``, float32 (cols,), weights the columns; types that take none ignore it. Rows must be finite, weights
    finite and not negative; neither is checked. ggml's errors are reproduced: weights that are all zero make a block
    zero, and an IQ3_S group of 32 zeros corrupts the groups that follow it in its block of 256.

    Raises:
        ValueError: for an unknown type, wrong shapes or dtypes, or a type that requires an importance matrix and has
        none.
    """
    row = _type(type)
    if rows.dtype != np.float32 or rows.ndim != 2:
        raise ValueError(f"rows must be (n, cols) float32, not {rows.shape} {rows.dtype}")
    n, cols = rows.shape
    out = _output(out, (n, row_bytes(type, cols)), np.uint8)
    if importance is not None and (importance.shape != (cols,) or importance.dtype != np.float32):
        raise ValueError(f"importance must be ({cols},) float32, not {importance.shape} {importance.dtype}")
    if row.needs_importance and importance is None:
        raise ValueError(f"{type} requires an importance matrix")
    rows = np.ascontiguousarray(rows)
    _load_grid(type)
    if type in _FLOATS:
        cast(rows, _FLOATS[type], out=out.view(_FLOATS[type]))
        return out
    weights = np.ascontiguousarray(importance) if importance is not None and row.takes_importance else None
    address = 0 if weights is None else weights.ctypes.data
    _native.gguf_quantize(type, rows.ctypes.data, address, n, cols, out.ctypes.data)
    return out


def dequantize(type: str, codes: Array, cols: int, out: Array | None = None) -> Array:
    """Dequantize blocks, uint8 (n, row_bytes), to float32 (n, cols): the values of ggml's ``to_float``.

    Raises:
        ValueError: for an unknown type or wrong shapes or dtypes.
    """
    row = _type(type)
    if codes.dtype != np.uint8 or codes.ndim != 2 or codes.shape[1] != row_bytes(type, cols):
        raise ValueError(f"{type} codes must be (n, {row_bytes(type, cols)}) uint8, not {codes.shape} {codes.dtype}")
    out = _output(out, (codes.shape[0], cols), np.float32)
    codes = np.ascontiguousarray(codes)
    _load_grid(type)
    if type in _FLOATS:
        cast(codes.view(_FLOATS[type]), np.float32, out=out)
        return out
    blocks = codes.shape[0] * (cols // row.block_elements)
    _native.gguf_dequantize(type, codes.ctypes.data, blocks, out.ctypes.data)
    return out


_GRIDS = {name: name for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")} | {"IQ1_S": "IQ1", "IQ1_M": "IQ1"}
_grid_lock = threading.Lock()


def _load_grid(type: str) -> None:
    """Give the kernels the grid of the type, which the gguf package contains."""
    if type in _GRIDS:
        with _grid_lock:
            _set_grid(_GRIDS[type])


@functools.cache
def _set_grid(grid: str) -> None:
    from gguf import quants

    quantization = quants.IQ1_S if grid == "IQ1" else getattr(quants, grid)
    quantization.init_grid()
    assert quantization.grid is not None
    values = quantization.grid.reshape(quantization.grid_shape)
    coordinates = np.searchsorted(quantization.grid_map, values).astype(np.uint8)
    _native.gguf_set_grid(grid, coordinates.tobytes())


def _type(name: str) -> GGUFType:
    try:
        return GGUF_TYPES[name]
    except KeyError:
        raise ValueError(f"unknown GGUF type {name!r}; known types are {', '.join(GGUF_TYPES)}") from None


def _output(out: Array | None, shape: tuple[int, int], dtype: type) -> Array:
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(f"out must be C-contiguous {shape} {np.dtype(dtype)}, not {out.shape} {out.dtype}")
    return out
