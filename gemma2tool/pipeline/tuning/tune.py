"""Gradient steps on the norms of a quantized model, towards the source's predictions.

What is tuned is the relative change of 1 + w, which is what a norm multiplies by. The steps are Adam's, with a rate
that falls to zero as a cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.devices import current_device
from gemma2tool.model.lazy import FLOAT32
from gemma2tool.model.norm_checksums import norm_names
from gemma2tool.pipeline.calibration.weights import Weights
from gemma2tool.pipeline.tuning.passes import Passes, divergence, head_of
from gemma2tool.quantizers.calibration import Map
from gemma2tool.reference.tensors import load_tensor
from gemma2tool.verify.compare.tuned_norms import LARGEST_CHANGE

STEPS, BATCH = 16, 4
"""Gradient steps, and sequences of each."""

RATE = 0.003
"""Change of 1 + w in the first step."""

_MEAN_DECAY, _SQUARE_DECAY, _TINY = 0.9, 0.95, 1e-12

Changes = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Teacher:
    """The source's predictions: its final hidden states (1, T, D) for each sequence of ``ids`` (n, T), and its head."""

    source: Checkpoint
    ids: NDArray[np.int64]
    states: Sequence[Tensor]

    @classmethod
    def of(cls, source: Checkpoint, ids: NDArray[np.int64], run: Map) -> Teacher:
        return cls(source, ids, Passes(source, run).hidden_states(ids))

    def divergences(self, candidate: Checkpoint, run: Map) -> NDArray[np.float64]:
        """KL(source || candidate) of each sequence, the mean over its positions, (n,)."""
        config, head, own_head = self.source.config, head_of(self.source), head_of(candidate)
        weights = Weights(current_device())
        weights.hold((head, own_head), run)
        pairs = list(zip(self.states, Passes(candidate, run).hidden_states(self.ids), strict=True))

        def one(pair: tuple[Tensor, Tensor]) -> float:
            return divergence(config, weights, (pair[0], head), (pair[1], own_head))[0]

        return np.array(list(run(one, pairs)))


def tuned_changes(
    candidate: Checkpoint, norms: Mapping[str, Tensor], teacher: Teacher, run: Map, advance: Callable[[int], None]
) -> Changes:
    """What to add to each norm of ``candidate``, (D,) by canonical name.

    ``norms``: where the steps start, float32. ``advance``: called with the number of tokens that are done, of those of
    STEPS * BATCH sequences.
    """
    gains = {name: 1 + weight for name, weight in norms.items()}
    adam = _Adam({name: torch.zeros_like(weight) for name, weight in norms.items()})
    order = _order(len(teacher.ids), STEPS * BATCH)
    for step in range(STEPS):
        picked = order[step * BATCH : (step + 1) * BATCH]
        present = {name: weight + gains[name] * adam.values[name] for name, weight in norms.items()}
        passes = Passes(candidate, run, present)
        _, gradients = passes.gradients(
            teacher.ids[picked], [teacher.states[number] for number in picked], head_of(teacher.source)
        )
        rate = RATE * (1 + math.cos(math.pi * step / STEPS)) / 2
        adam.step({name: gradient.cpu() * gains[name] for name, gradient in gradients.items()}, rate)
        advance(BATCH * teacher.ids.shape[1])
    return {name: (gains[name] * change).numpy() for name, change in adam.values.items()}


def starting_norms(source: Checkpoint) -> dict[str, Tensor]:
    """The source's norms, float32, by canonical name."""
    tensors = source.tensors
    return {name: load_tensor(tensors[name], torch.float32, "cpu") for name in norm_names(source.config)}


def _order(count: int, draws: int) -> list[int]:
    """Numbers below ``count`` in random order, each as often as the others, ``draws`` of them."""
    generator = np.random.default_rng(0)
    rounds = [generator.permutation(count) for _ in range(-(-draws // count))]
    return [int(number) for number in np.concatenate(rounds)[:draws]]


class _Adam:
    """``values``: relative changes, by name, held to LARGEST_CHANGE."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values, self.steps = values, 0
        self.means = {name: torch.zeros_like(value) for name, value in values.items()}
        self.squares = {name: torch.zeros_like(value) for name, value in values.items()}

    def step(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        self.steps += 1
        for name, gradient in gradients.items():
            self.means[name].lerp_(gradient, 1 - _MEAN_DECAY)
            self.squares[name].lerp_(gradient**2, 1 - _SQUARE_DECAY)
            mean = self.means[name] / (1 - _MEAN_DECAY**self.steps)
            square = self.squares[name] / (1 - _SQUARE_DECAY**self.steps)
            self.values[name] -= rate * mean / (square.sqrt() + _TINY)
            self.values[name].clamp_(-LARGEST_CHANGE, LARGEST_CHANGE)


def agrees(before: NDArray[np.float64], after: NDArray[np.float64]) -> bool:
    """Whether the divergences (n,) of the same sequences fell, by more than twice the standard error of the mean."""
    fall = before - after
    return bool(fall.mean() > 2 * fall.std(ddof=1) / math.sqrt(len(fall)))


def shrunk(changes: Changes, share: float) -> Changes:
    """A share of the changes."""
    return {name: FLOAT32.type(share) * change for name, change in changes.items()}
