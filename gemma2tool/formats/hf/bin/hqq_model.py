"""hqq's own file, qmodel.pt: a dictionary of the model's modules, each with its tensors and, of quantized ones, what
describes them. Read as the tensors that hqq's safetensors have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gemma2tool.containers.torch_zip.reader import TorchTensor
from gemma2tool.model.lazy import Array, ArrayTensor, LazyTensor

CODES = "W_q"


def is_hqq_model(tree: Mapping[str, Any]) -> bool:
    return any(isinstance(module, Mapping) and CODES in module for module in tree.values())


def stored_tensors(tree: Mapping[str, Any]) -> dict[str, TorchTensor]:
    """The tensors in the file, by module and part."""
    return {name: value for name, value in _parts(tree) if isinstance(value, TorchTensor)}


def descriptions(tree: Mapping[str, Any], where: str) -> dict[str, LazyTensor]:
    """What describes the quantized weights, as tensors. ``where`` names the file."""
    arrays = {name: _array(value) for name, value in _parts(tree)}
    return {name: ArrayTensor(array, origin=f"{where}: {name}") for name, array in arrays.items() if array is not None}


def _parts(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Module and part, and its value. Releases before 0.2 have the description in a dictionary of its own."""
    for module, state in tree.items():
        if isinstance(state, Mapping):
            meta = state.get("meta")
            parts = {**state, **meta} if isinstance(meta, Mapping) else state
            yield from ((f"{module}.{part}", value) for part, value in parts.items())


def _array(value: object) -> Array | None:
    if isinstance(value, str):
        return np.frombuffer(value.encode("latin-1", "replace"), np.uint8)
    if isinstance(value, bool):
        return np.array(value, np.uint8)
    if isinstance(value, int) and abs(value) < 1 << 31:
        return np.array(value, np.int32)
    if isinstance(value, tuple) and all(type(size) is int and 0 <= size < 1 << 62 for size in value):
        return np.array(value, np.int64)
    return None
