"""The output sides of the layers' Hessians (see ``gradients``): computed from the last layer to the first, used from
the first to the last.

Meanwhile they are kept beside the output, which also serves a run that continues; in memory where nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.devices import current_device
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.pipeline.calibration.boundaries import Kept
from gemma2tool.pipeline.calibration.gradients import output_hessians, sequence_count, some_sequences
from gemma2tool.pipeline.calibration.layer import DOWN, GATE, KEY, OUTPUT, QUERY, UP, VALUE
from gemma2tool.pipeline.ranks.together import ALONE, Ranks
from gemma2tool.quantizers.calibration import Map
from gemma2tool.quantizers.calibration.hessian import Factor, Hessian, inverse_factors
from gemma2tool.storage.buffers import AnyBuffer

DAMPING = 0.1
"""Share of its mean that is added to the diagonal, and another share of outputs over tokens: with few tokens, what lies
beside the diagonal is mostly chance.
"""

INNER_BLOCK = 512
"""Rows of gate and up whose outputs count as dependent: they have four times as many as the others, and more."""


def output_sizes(config: Gemma2Config) -> dict[str, tuple[int, int | None]]:
    """The outputs of each projection and the size of its Hessian's blocks, None for the whole."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    width, inner = (config.hidden_size, None), (config.intermediate_size, INNER_BLOCK)
    return {
        QUERY: (queries, None),
        KEY: (keys, None),
        VALUE: (keys, None),
        OUTPUT: width,
        GATE: inner,
        UP: inner,
        DOWN: width,
    }


def layer_bytes(config: Gemma2Config) -> int:
    """Bytes of one layer's Hessians."""
    return sum(outputs * min(block or outputs, outputs) for outputs, block in output_sizes(config).values()) * 4


def output_factors(hessian: Hessian, tokens: int) -> list[Factor]:
    """The factors of the inverse of a Hessian of outputs over so many ``tokens``: rows are rounded from the largest
    diagonal element to the smallest. Empties ``hessian``.
    """
    return inverse_factors(hessian, DAMPING + len(hessian.squares[0]) / tokens, act_order=True)


@dataclass
class OutputSide:
    """Hands out the factors of each layer.

    ``tensors``: the unquantized ones, by canonical name. ``ids``: of the calibration, (N, T). ``kept``: where they
    wait for their layer; None for memory. ``ranks``: the processes that share the work; the first keeps the results.
    ``elsewhere``: where other outputs of this run keep the same.
    """

    checkpoint: Checkpoint
    tensors: Mapping[str, LazyTensor]
    ids: NDArray[np.int64]
    quantized: Iterable[str]
    kept: Kept | None = None
    ranks: Ranks = ALONE
    elsewhere: Sequence[Kept] = ()
    _waiting: dict[int, dict[str, Hessian]] = field(default_factory=dict)

    def factors(self, layer: int, run: Map) -> dict[str, list[Factor]]:
        """``output_factors`` of each quantized projection, by canonical name."""
        names = self._names(layer)
        if not names:
            return {}
        hessians = self._load(layer, names)
        if self.ranks.agreed(hessians is None):
            self._compute(run)
            hessians = self._load(layer, names)
        if hessians is None:
            assert self.ranks.index
            hessians = self._empty(names)
        self.ranks.copy_from_first([panel for hessian in hessians.values() for panel in hessian.panels()])
        prefix = f"model.layers.{layer}."
        tokens = sequence_count(self.ids.shape) * self.ids.shape[1]
        return {
            f"{prefix}{name}.weight": output_factors(hessian.to(current_device()), tokens)
            for name, hessian in hessians.items()
        }

    def _names(self, layer: int) -> list[str]:
        """The layer's quantized projections."""
        return [name for name in output_sizes(self.checkpoint.config) if self._is_quantized(layer, name)]

    def _is_quantized(self, layer: int, name: str) -> bool:
        return f"model.layers.{layer}.{name}.weight" in self.quantized

    def _compute(self, run: Map) -> None:
        sizes = output_sizes(self.checkpoint.config)
        blocks = {name: block for name, (_, block) in sizes.items()}
        ids = some_sequences(self.ids)
        for layer, hessians in output_hessians(self.checkpoint, self.tensors, ids, blocks, run, self.ranks):
            if self.ranks.index:
                continue
            wanted = {name: hessians[name].to("cpu") for name in self._names(layer)}
            if self.kept is None:
                self._waiting[layer] = wanted
            else:
                self.kept.write(_name(layer), _buffers(wanted))

    def _load(self, layer: int, names: Iterable[str]) -> dict[str, Hessian] | None:
        if self.kept is None:
            return self._waiting.pop(layer, None)
        hessians = self._empty(names)
        places, buffers = (self.kept, *self.elsewhere), _buffers(hessians)
        return hessians if any(place.read_into(_name(layer), buffers) for place in places) else None

    def _empty(self, names: Iterable[str]) -> dict[str, Hessian]:
        sizes = output_sizes(self.checkpoint.config)
        return {name: Hessian(*sizes[name]) for name in names}


def _name(layer: int) -> str:
    return f"output-{layer:04}"


def _buffers(hessians: Mapping[str, Hessian]) -> list[AnyBuffer]:
    return [square.numpy() for hessian in hessians.values() for square in hessian.squares]  # in main memory
