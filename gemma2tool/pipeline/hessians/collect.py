"""Collects the Hessians of all layers: first the gradients' from the last layer to the first, then the inputs' from the
first to the last, all of the unquantized model.

Sequences are summed a slice at a time and the slices' sums pairwise, so that several machines, each with its shard of
the slices, get the bytes that one machine gets.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.calibration.boundaries import Boundaries
from gemma2tool.pipeline.calibration.collected import HEAD_INPUTS
from gemma2tool.pipeline.calibration.gradients import Summation, output_hessians, sequence_count
from gemma2tool.pipeline.calibration.head import head_hessian
from gemma2tool.pipeline.calibration.layer import DOWN, GATE, OUTPUT, QUERY, SEQUENCES, CalibratedLayer
from gemma2tool.pipeline.calibration.output_side import output_sizes
from gemma2tool.pipeline.sharding.pairwise import PairwiseSum
from gemma2tool.quantizers.calibration import Map
from gemma2tool.quantizers.calibration.hessian import Hessian
from gemma2tool.reference.rotary import cos_sin
from gemma2tool.reference.streaming import StreamedForward

SLICE = 2 * SEQUENCES
"""Sequences of a slice of the inputs' sums. Each doubling of the slices takes memory for another Hessian."""

GRADIENT_SLICE = SEQUENCES

Write = Callable[[str, PairwiseSum], None]
"""Takes what was summed of the Hessian of that name, packed."""


class PairwiseHessian(Hessian):
    """A Hessian whose summands are slices of ``adds`` calls of ``add``, the first of them number ``first``."""

    def __init__(
        self,
        columns: int,
        block: int | None = None,
        *,
        first: int,
        adds: int,
        device: torch.device | str = "cpu",
        share: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__(columns, block, device=device, share=share)
        self._sums, self._adds, self._waiting = PairwiseSum(first), adds, 0

    def add(self, x: Tensor, run: Map = map) -> None:
        super().add(x, run)
        self._waiting += 1
        if self._waiting == self._adds:
            self._end_slice()

    def sums(self) -> PairwiseSum:
        """The sums over all slices; the last one may be shorter."""
        if self._waiting:
            self._end_slice()
        return self._sums

    @property
    def is_finite(self) -> bool:
        return all(bool(np.isfinite(node).all()) for node in self.sums().nodes)

    def _end_slice(self) -> None:
        self._sums.add(self.packed())
        for square in self.squares:
            square.zero_()
        self._waiting = 0


class Collection:
    """One collection. ``run``: runs pieces of work, such as ``map`` or a thread pool's. ``write``: takes the sums."""

    def __init__(self, checkpoint: Checkpoint, block: int | None, run: Map, write: Write) -> None:
        self.checkpoint, self.block, self.run, self.write = checkpoint, block, run, write

    def outputs(self, ids: NDArray[np.int64], first: int) -> None:
        """Collect the gradients over ``ids`` (n, T), whose first slice is number ``first``."""
        config = self.checkpoint.config
        blocks = {name: block for name, (_, block) in output_sizes(config).items()}
        summation = Summation(partial(PairwiseHessian, first=first, adds=GRADIENT_SLICE), first * GRADIENT_SLICE)
        tensors = self.checkpoint.tensors
        for layer, hessians in output_hessians(self.checkpoint, tensors, ids, blocks, self.run, summation=summation):
            for name in list(hessians):
                self._write(f"model.layers.{layer}.{name}.outputs", hessians.pop(name))

    def inputs(self, ids: NDArray[np.int64], first: int, boundaries: Boundaries) -> None:
        """Collect the inputs over ``ids`` (n, T), whose first slice is number ``first``, from the layer on at which
        ``boundaries`` has an earlier run's residual streams.
        """
        config, (count, length) = self.checkpoint.config, ids.shape
        new_hessian = partial(PairwiseHessian, first=first, adds=SLICE // SEQUENCES)
        residual = [torch.empty(1, length, config.hidden_size) for _ in range(count)]
        start = boundaries.load(residual)
        if not start:
            residual = [StreamedForward(self.checkpoint, row[None], device="cpu").embeddings() for row in ids]
        for index in range(start, config.num_hidden_layers):
            layer = CalibratedLayer(config, index, self.checkpoint.tensors, (), hessian_block=self.block, run=self.run)
            layer.new_hessian = new_hessian
            cos, sin = cos_sin(config, torch.arange(length, device=layer.device)[None], residual[0].dtype)
            layer.calibrate(_Inputs(self), residual, cos, sin)
            boundaries.save(index + 1, residual)
        self._write(
            HEAD_INPUTS,
            head_hessian(self.checkpoint, residual, self.block, self.run, new_hessian=new_hessian),
        )

    def _write(self, name: str, hessian: Hessian) -> None:
        assert isinstance(hessian, PairwiseHessian)
        self.write(name, hessian.sums())


class _Inputs:
    """A method (see ``calibration.layer``) that changes nothing and passes the Hessians on."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection

    def attention_input(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._write(layer, QUERY, hessian)

    def attention_output(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._write(layer, OUTPUT, hessian)

    def mlp_input(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._write(layer, GATE, hessian)

    def mlp_output(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._write(layer, DOWN, hessian)

    def _write(self, layer: CalibratedLayer, name: str, hessian: Hessian) -> None:
        self.collection._write(f"{layer.prefix}{name}.inputs", hessian)


def slice_counts(shape: tuple[int, ...]) -> dict[str, int]:
    """How many slices of inputs and of outputs there are of ids (N, T)."""
    return {"inputs": -(-shape[0] // SLICE), "outputs": -(-sequence_count(shape) // GRADIENT_SLICE)}
