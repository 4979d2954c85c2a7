"""In the witness: rows of nf4, fp4 and int8 weights as bitsandbytes dequantizes them.

A whole weight is never dequantized. Its absmax values are, by the library; then the blocks that hold the rows become a
weight of their own, one block a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from gemma2tool.engines.library import imported
from gemma2tool.engines.messages import Message, sentence

Weights = Mapping[str, tuple[str, list[int], list[list[int]]]]
"""Canonical name -> its name in the file, shape, ranges of rows."""


def dequantize(tensors: Mapping[str, Any], weights: Weights) -> Iterator[Message]:
    """The messages for ``weights``."""

    def load() -> ModuleType:
        import bitsandbytes.functional

        return bitsandbytes

    library, message = imported("bitsandbytes", load)
    yield message
    for name, (stored, shape, ranges) in weights.items():
        about = {"name": name, "stored": stored}
        kind = f"{stored.removesuffix('weight')}SCB"
        try:
            rows = _int8(library, tensors, stored, shape) if kind in tensors else _four_bit(library, tensors, stored)
        except (ValueError, KeyError, AssertionError, AttributeError) as error:
            yield Message({"kind": "refused", "message": f"{stored}: {sentence(error)}"})
            continue
        if rows.shape != shape:
            yield Message({"kind": "shape", **about, "shape": rows.shape})
            continue
        for first, last in ranges:
            values = np.ascontiguousarray(rows.values(first, last).float().numpy())
            yield Message({"kind": "values", **about, "first": first, "last": last}, values.tobytes())


class _Int8:
    def __init__(self, library: Any, codes: Any, scales: Any, shape: list[int]) -> None:
        self.library, self.codes, self.scales, self.shape = library, codes, scales, shape

    def values(self, first: int, last: int) -> Any:
        import torch

        codes = torch.from_numpy(np.ascontiguousarray(self.codes[first:last]))
        return self.library.functional.int8_vectorwise_dequant(codes, self.scales[first:last])


class _FourBit:
    """``state``: the library's, with absmax values that are not quantized any more."""

    def __init__(self, library: Any, codes: Any, state: Any) -> None:
        self.library, self.codes, self.state = library, codes, state
        self.shape = [int(dim) for dim in state.shape]

    def values(self, first: int, last: int) -> Any:
        import torch

        functional, state, columns = self.library.functional, self.state, self.shape[1]
        blocksize, values = state.blocksize, self.shape[0] * columns
        start, stop = first * columns, last * columns
        first_block, last_block = start // blocksize, -(-stop // blocksize)
        first_byte, last_byte = first_block * blocksize // 2, -(-min(last_block * blocksize, values) // 2)
        width = self.codes[0:1].dtype.itemsize  # codes may be stored under a wider type
        packed = np.ascontiguousarray(self.codes[first_byte // width : -(-last_byte // width)]).reshape(-1)
        codes = torch.from_numpy(packed.view(np.uint8)[: last_byte - first_byte].copy()).reshape(-1, 1)
        count = min(last_block * blocksize, values) - first_block * blocksize
        whole = count % blocksize == 0
        part = functional.QuantState(
            absmax=state.absmax[first_block:last_block].contiguous(),
            shape=torch.Size((count // blocksize, blocksize) if whole else (1, count)),
            code=state.code,
            blocksize=blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        rows = functional.dequantize_4bit(codes, part).reshape(-1)
        skipped = start - first_block * blocksize
        return rows[skipped : skipped + stop - start].reshape(last - first, columns)


def _int8(library: Any, tensors: Mapping[str, Any], stored: str, shape: list[int]) -> _Int8:
    import torch

    scales = np.asarray(tensors[f"{stored.removesuffix('weight')}SCB"][:], np.float32)
    codes = tensors[stored]
    actual = list(codes.get_shape())
    return _Int8(library, codes, torch.from_numpy(scales), actual)


def _four_bit(library: Any, tensors: Mapping[str, Any], stored: str) -> _FourBit:
    import torch

    parts = {
        name.removeprefix(f"{stored}."): torch.from_numpy(np.array(tensors[name][:]))
        for name in tensors
        if name.startswith(f"{stored}.")
    }
    functional = library.functional
    state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    if state.nested:  # as the library's dequantize_4bit does
        state.absmax = (functional.dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
        state.nested = False
    return _FourBit(library, tensors[stored], state)
