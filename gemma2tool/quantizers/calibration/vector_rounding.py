"""Error feedback onto the block types whose codes are vectors of columns (IQ2, IQ3): a block at a time."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from gemma2tool.model.lazy import Array
from gemma2tool.quantizers.calibration.rounded import Rounded
from gemma2tool.quantizers.calibration.vector_layouts import COLUMNS, VECTOR_LAYOUTS, VectorFields, entries_of
from gemma2tool.quantizers.gguf_types import GGUF_TYPES
from gemma2tool.quantizers.kernels import _native

STEPS = (0, -1, 1, -2, 2)
"""Stored scales near those of the type's search that are tried."""

HIGHEST = 15


def round_vectors(type: str, columns: Array, upper: Tensor, super_scale: Array, stored: Array) -> Rounded:
    """Blocks of ``type`` from float32 columns (n, 256), with scales near ``stored`` (n, groups) under ``super_scale``
    (n,). ``upper``: the columns' factor.
    """
    layout, entries, n = VECTOR_LAYOUTS[type], entries_of(type), len(columns)
    near = np.clip(stored[:, :, None].astype(np.int16) + np.array(STEPS, np.int16), 0, HIGHEST)
    scales = np.ascontiguousarray(layout.scales(super_scale, near))
    values = np.ascontiguousarray(columns)
    codes, signs = np.empty((n, COLUMNS // layout.size), np.uint16), np.empty((n, COLUMNS // 8), np.uint8)
    choices = np.empty((n, layout.groups), np.uint8)
    errors, losses = np.empty((n, COLUMNS), np.float32), np.empty(n, np.float32)
    assert scales.dtype == values.dtype == np.float32
    _native.feedback_round_vectors(
        x=values.ctypes.data,
        rows=n,
        stride=COLUMNS,
        upper=upper.data_ptr(),
        upper_stride=upper.stride(0),
        entries=entries.ctypes.data,
        entry_count=len(entries),
        size=layout.size,
        even_signs=layout.even_signs,
        width=layout.width,
        groups=layout.groups,
        scales=scales.ctypes.data,
        scale_count=scales.shape[2],
        codes=codes.ctypes.data,
        signs=signs.ctypes.data,
        scale_choices=choices.ctypes.data,
        errors=errors.ctypes.data,
        losses=losses.ctypes.data,
    )
    blocks = np.zeros((n, GGUF_TYPES[type].block_bytes), np.uint8)
    chosen = np.take_along_axis(near, choices[:, :, None].astype(np.intp), 2)[:, :, 0]
    layout.write(blocks, VectorFields(super_scale, chosen, codes, signs))
    return Rounded(blocks, errors, losses)
