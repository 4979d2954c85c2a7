"""A matrix as the calibration multiplies with it: read, or decoded, a block of rows at a time on the processor, and
held in the memory of a GPU while it is in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gemma2tool.errors import InputRefused
from gemma2tool.model.devices import fits_on
from gemma2tool.model.lazy import FLOAT32, Array, LazyTensor, row_ranges
from gemma2tool.quantizers.calibration import Map

BLOCK_BYTES = 8 << 20
"""Rows of a weight that are multiplied with at once, as float32."""


Read = Callable[[LazyTensor, int, int], Array]
"""Rows of a weight from one to another, float32."""


def finite_rows(weight: LazyTensor, first: int, last: int) -> Array:
    """Rows of a weight, float32. Raises ``InputRefused`` if they are not finite."""
    rows = weight.load_rows_f32(first, last)
    if not np.isfinite(rows).all():
        raise InputRefused(
            "weights.nonfinite",
            f"{weight.origin}: contains NaN or infinite values",
            hint="such a checkpoint cannot be calibrated; quantize without --calibration, or use another copy",
        )
    return rows


class Weights:
    """Multiplies with matrices (O, I), float32, on ``device``. What ``hold`` has put into a GPU's memory is multiplied
    with at once; everything else is read at each use. ``read``: how rows are read.
    """

    def __init__(self, device: torch.device, read: Read = finite_rows) -> None:
        self.device, self._read = device, read
        self._held: dict[LazyTensor, Tensor] = {}

    def hold(self, weights: Iterable[LazyTensor], run: Map) -> None:
        """Put ``weights`` into the GPU's memory in place of those that are there, as far as they fit; does nothing on
        the processor. Not to be called while another thread multiplies.
        """
        if self.device.type == "cpu":
            return
        wanted = list(weights)
        self._held = {weight: held for weight, held in self._held.items() if weight in wanted}
        for weight in wanted:
            if weight not in self._held and fits_on(self.device, weight.size * FLOAT32.itemsize):
                self._held[weight] = self._load(weight, run)

    def times(self, x: Tensor, weight: LazyTensor) -> Tensor:
        """x (..., I) times the transpose of a weight."""
        if weight in self._held:
            return F.linear(x, self._held[weight])
        product = x.new_empty(*x.shape[:-1], weight.rows)
        for first, last, rows in self._blocks(weight):
            product[..., first:last] = F.linear(x, rows)
        return product

    def times_transposed(self, y: Tensor, weight: LazyTensor) -> Tensor:
        """y (..., O) times a weight."""
        if weight in self._held:
            return y @ self._held[weight]
        product = y.new_zeros(*y.shape[:-1], weight.row_size)
        for first, last, rows in self._blocks(weight):
            product += y[..., first:last] @ rows
        return product

    def _load(self, weight: LazyTensor, run: Map) -> Tensor:
        held = torch.empty(weight.rows, weight.row_size, device=self.device)

        def copy(block: tuple[int, int]) -> None:
            held[block[0] : block[1]] = _tensor(self._read(weight, *block)).to(self.device)

        for _ in run(copy, _ranges(weight)):
            pass
        return held

    def _blocks(self, weight: LazyTensor) -> Iterator[tuple[int, int, Tensor]]:
        for first, last in _ranges(weight):
            yield first, last, _tensor(self._read(weight, first, last)).to(self.device)


def _ranges(weight: LazyTensor) -> list[tuple[int, int]]:
    return list(row_ranges(weight.rows, weight.row_size * FLOAT32.itemsize, BLOCK_BYTES))


def _tensor(rows: Array) -> Tensor:
    return torch.from_numpy(rows if rows.flags.writeable else rows.copy())
