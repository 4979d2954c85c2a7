"""Types of quantized folders as candidates: how wide their groups are, how large they are, and rows in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gemma2tool.formats import packings
from gemma2tool.model.lazy import Array, ArrayTensor, DType, to_float32
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers import mlx
from gemma2tool.quantizers.base import Encoder
from gemma2tool.quantizers.calibration.grid import grid_of
from gemma2tool.quantizers.casts import cast
from gemma2tool.quantizers.compressed import SCHEMES

if TYPE_CHECKING:
    from gemma2tool.quantizers.calibration.hessian import Factor


class FolderType(NamedTuple):
    """``bits``: of a value, scales included. ``width``: columns of a group, which must divide the rows. ``takes_head``:
    whether the embedding is quantized too.
    """

    bits: float
    width: int
    takes_head: bool


FOLDER_TYPES: Mapping[str, FolderType] = MappingProxyType(
    {
        **{f"mlx-{bits}": FolderType(bits + 32 / mlx.GROUP_SIZE, mlx.GROUP_SIZE, True) for bits in (2, 3, 4, 5, 6, 8)},
        "nf4": FolderType(4.5, 1, False),
        "fp4": FolderType(4.5, 1, False),
        "int8": FolderType(8.0, 1, False),
        "w4a16": FolderType(4.125, SCHEMES["w4a16"].group_size or 1, False),
        "w8a16": FolderType(8.125, SCHEMES["w8a16"].group_size or 1, False),
    }
)
"""Those whose inference computes with unrounded activations, so that the KL of their weights is that of the model, and
bitsandbytes' int8, whose rounding of activations does not count.
"""
_NAME = "model.layers.0.mlp.up_proj.weight"


def values(type: str, rows: Array, dtype: DType, factors: Sequence[Factor] | None) -> Array:
    """Float32 rows (n, I) stored in ``type`` and read again. ``dtype``: of the weight before it is quantized.
    ``factors``: of the inverse Hessian of its inputs; None: codes are the nearest.
    """
    columns, typed = rows.shape[1], cast(rows, dtype)
    spec = TensorSpec(_NAME, rows.shape, role="mlp", layer=0, quantizable=True, required=True)
    encoder = packings.encoder_for(spec, packings.Settings(type), ArrayTensor(typed))
    assert encoder is not None
    if factors is None:
        return _read_again(type, encoder, typed)
    grid = grid_of(encoder, columns)
    assert grid is not None
    groups = np.arange(columns, dtype=np.int32) // np.int32(grid.group_size)
    return grid.values(grid.round_rows(rows, factors), groups)


def _read_again(type: str, encoder: Encoder, rows: Array) -> Array:
    encoded = dict(encoder.encode(rows))
    collected = {suffix: encoded.pop(suffix) for suffix in encoder.collects if suffix in encoded}
    encoded |= encoder.finish(rows.shape, collected)
    parts = {packings.part_name(_NAME, suffix): ArrayTensor(array) for suffix, array in encoded.items()}
    config = packings.quantization_config(packings.Settings(type))
    return to_float32(packings.unpack(parts, config)[_NAME].load())
