"""Encodes whole tensors as a packing stores them, for tests."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import torch

from gemma2tool.formats import packings
from gemma2tool.formats.mapping.container_tensors import NUMPY_DTYPES
from gemma2tool.formats.packings import Settings
from gemma2tool.model.lazy import ArrayTensor, LazyTensor
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers.base import Encoder

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BF16]
NAME = "model.layers.0.mlp.up_proj.weight"


def spec(name: str, shape: tuple[int, ...]) -> TensorSpec:
    """A spec for a tensor whose name looks like one of Gemma 2's."""
    layer = int(name.split(".")[2]) if name.startswith("model.layers.") else None
    role = "norm" if "norm" in name else "embedding" if "embed" in name else "head" if "head" in name else "mlp"
    return TensorSpec(name, shape, role, layer, quantizable=len(shape) == 2, required=True)


def encoded(encoder: Encoder, source: LazyTensor, rows_at_once: int = 3) -> dict[str, np.ndarray]:
    """Every part, encoded from ranges of rows; checks the types, shapes and sizes that the encoder declares."""
    step = encoder.row_multiple(source.shape) * rows_at_once
    pieces = [encoder.encode(source.load_rows(a, min(a + step, source.rows))) for a in range(0, source.rows, step)]
    whole = {suffix: np.concatenate([piece[suffix] for piece in pieces]) for suffix in pieces[0]}
    whole |= encoder.finish(source.shape, {suffix: whole[suffix] for suffix in encoder.collects})
    for part in encoder.parts(source.shape):
        array = whole[part.suffix]
        assert (array.shape, array.nbytes, array.dtype) == (part.shape, part.nbytes, NUMPY_DTYPES[part.dtype]), part
    return {part.suffix: whole[part.suffix] for part in encoder.parts(source.shape)}


def stored_parts(
    name: str, source: LazyTensor, settings: Settings | str, rows_at_once: int = 3
) -> dict[str, np.ndarray]:
    """The arrays that a folder of this type stores for one canonical tensor, by stored name."""
    settings = Settings(settings) if isinstance(settings, str) else settings
    encoder = packings.encoder_for(spec(name, source.shape), settings, source)
    if encoder is None:
        return {name: source.load()}
    parts = encoded(encoder, source, rows_at_once)
    return {packings.part_name(name, suffix): array for suffix, array in parts.items()}


def lazy(arrays: Mapping[str, np.ndarray]) -> dict[str, LazyTensor]:
    return {name: ArrayTensor(array, origin=f"model.safetensors: {name}") for name, array in arrays.items()}


def to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    return torch.from_numpy(array.copy())


def bits(value: torch.Tensor | np.ndarray) -> bytes:
    """The bytes of a tensor or an array."""
    if isinstance(value, torch.Tensor):
        return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return np.ascontiguousarray(value).tobytes()


def stored_as(kind: str) -> str:
    """The name of how a type stores a weight: some types differ from another in what inputs are rounded to."""
    return "w4a16" if kind == "w4afp8" else kind.removesuffix("-dynamic") if kind.startswith("torchao") else kind
