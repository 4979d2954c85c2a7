"""Parameters that google-deepmind/gemma's ``peft`` has wrapped: quantized with ``peft.quantize``, or put into the
modules of quantization-aware training.

A quantized parameter is a kernel of int4 or int8 codes and a scale for each channel by which they are divided
(``gemma/peft/_quantization_utils.py``). One of quantization-aware training is a kernel with the values that are trained
(``gemma/gm/ckpts/_quantization.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.formats.orbax.zarr_arrays import StoredArray
from gemma2tool.model.lazy import FLOAT32, Array, LazyTensor, to_float32

_WRAPPED = re.compile(r"(.+)/_(?:Int|SimulateQuantized)Einsum_(\w+)/(kernel|scale)")
_ITSELF = "0"
"""The wrapper of the parameter whose name comes before it; other wrappers are called by the parameter's own."""


def unwrapped(arrays: Mapping[str, StoredArray]) -> tuple[dict[str, StoredArray], dict[str, StoredArray]]:
    """The parameters' arrays, and the scales of those that are quantized, by the names that they have unwrapped."""
    parameters: dict[str, StoredArray] = {}
    scales: dict[str, StoredArray] = {}
    for name, array in arrays.items():
        wrapped = _WRAPPED.fullmatch(name)
        if wrapped is None:
            parameters[name] = array
            continue
        parameter = wrapped[1] if wrapped[2] == _ITSELF else f"{wrapped[1]}/{wrapped[2]}"
        (parameters if wrapped[3] == "kernel" else scales)[parameter] = array
    return parameters, scales


class Dequantized(LazyTensor):
    """Codes divided by the scales of their channels, in float32: the matrix of the last axis' rows.

    A scale has as many axes as the codes, each of the codes' length or of length 1.
    """

    def __init__(self, codes: StoredArray, scales: StoredArray, *, kept: bool = True) -> None:
        fits = len(codes.shape) == len(scales.shape) > 1 and all(
            size in (1, dim) for size, dim in zip(scales.shape, codes.shape, strict=True)
        )
        if not fits:
            raise InputRefused(
                "checkpoint.shape",
                f"{scales.origin}: scales of shape {scales.shape} do not fit codes of shape {codes.shape}",
            )
        self.codes, self.scales = codes.codes(kept=kept), scales.matrix(kept=kept)
        rows = np.arange(prod(scales.shape[:-1])).reshape(scales.shape[:-1])
        self.scale_rows = np.broadcast_to(rows, codes.shape[:-1]).reshape(-1)
        self.shape, self.dtype = self.codes.shape, FLOAT32
        self.stored, self.origin = f"{codes.dtype.name}-channels", codes.origin

    def load_rows(self, first: int, last: int) -> Array:
        codes = self.codes.load_rows(first, last).astype(FLOAT32)
        if first == last:
            return codes
        used = self.scale_rows[first:last]
        low = int(used.min())
        scales = to_float32(self.scales.load_rows(low, int(used.max()) + 1))
        return codes / scales[used - low]
