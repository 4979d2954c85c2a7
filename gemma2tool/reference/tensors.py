"""Conversion of lazily loaded numpy tensors to torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gemma2tool.model.lazy import BFLOAT16, Array, LazyTensor, row_ranges

_BLOCK_BYTES = 16 << 20  # read at once while a tensor is converted


def to_torch(array: Array) -> Tensor:
    """A torch tensor that shares the array's memory if that is contiguous and writable; numpy's bfloat16 becomes
    torch's."""
    array = np.ascontiguousarray(array)
    if not array.flags.writeable:  # torch warns of memory that it must not write to
        array = array.copy()
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def load_tensor(tensor: LazyTensor, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """The whole tensor as ``dtype`` on ``device``, read and converted a block of rows at a time."""
    if not tensor.shape:
        return to_torch(tensor.load()).to(device, dtype)
    out = torch.empty(tensor.shape, dtype=dtype, device=device)
    for first, last in row_ranges(tensor.rows, tensor.row_size * tensor.dtype.itemsize, _BLOCK_BYTES):
        out[first:last] = to_torch(tensor.load_rows(first, last)).to(device)
    return out
