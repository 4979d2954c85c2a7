"""A signature: what a mistake makes of the source's tensors, and how to say so.

A mistake is written down once, as the function that makes it. Whether it happened is then a comparison of what it would have made
with what the candidate holds, and two mistakes in one tensor are one function after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import FLOAT32, LazyTensor, MappedRows, to_float32
from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.diagnosis.names import name_of, place


class Weights(Mapping[str, LazyTensor]):
    """Tensors by canonical name, and the config they belong to."""

    def __init__(self, tensors: Mapping[str, LazyTensor], config: Gemma2Config) -> None:
        self.tensors, self.config = tensors, config

    def __getitem__(self, name: str) -> LazyTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def sibling(self, name: str, kind: str) -> LazyTensor | None:
        """The tensor of ``kind`` in the layer of ``name``."""
        return self.get(name_of(kind, place(name).layer))

    def after(self, step: Step, name: str) -> Weights:
        """What the mistake makes of every tensor that it concerns, the others as they are. A move is made with ``name``, and between
        layers with what stands beside it."""
        return Weights(_Mistaken(self, step, name), self.config)


class _Mistaken(Mapping[str, LazyTensor]):
    def __init__(self, weights: Weights, step: Step, name: str) -> None:
        self.weights, self.step, self.name = weights, step, name

    def __getitem__(self, name: str) -> LazyTensor:
        if isinstance(self.step, Move):
            return self.weights[self._origin(self.step, name)]
        made = self.step.of(self.weights, name)
        return self.weights[name] if made is None else made

    def _origin(self, move: Move, name: str) -> str:
        if name == self.name:
            return move.origin
        here, there, asked = place(self.name), place(move.origin), place(name)
        together = here.kind == there.kind and here.layer == asked.layer is not None
        return name_of(asked.kind, there.layer) if together else name

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


Transform = Callable[[Weights, str], LazyTensor | None]
"""What the tensor of that name would be; None where the mistake cannot be made with it."""


@dataclass(frozen=True)
class Signature:
    """One known mistake. ``kinds``: of the tensors that it concerns; empty: any.

    ``says``: the sentence, with ``{what}`` for the tensors, ``{are}`` and ``{have}`` in their number, and ``{exactly}``, which is
    "exactly " where every value is reproduced bit for bit. ``exact``: only a tensor reproduced bit for bit counts (the mistake is
    itself a rounding). ``needs``: what else the comparison must have found. ``costly``: few rows of it need all of the source's, so it is tried last.
    """

    id: str
    kinds: tuple[str, ...]
    says: str
    transform: Transform
    exact: bool = False
    needs: Callable[[TensorComparison], bool] | None = None
    costly: bool = False

    def of(self, weights: Weights, name: str) -> LazyTensor | None:
        if self.kinds and place(name).kind not in self.kinds:
            return None
        return self.transform(weights, name) if name in weights else None

    def sentence(self, what: str, several: bool, exact: bool) -> str:
        words = {"are": "are" if several else "is", "have": "have" if several else "has"}
        return self.says.format(what=what, exactly="exactly " if exact else "", **words)


@dataclass(frozen=True)
class Move:
    """The tensor is that of another name."""

    origin: str

    def of(self, weights: Weights, name: str) -> LazyTensor | None:
        return weights.get(self.origin)


Step = Signature | Move


def values(function: Callable[[np.ndarray], np.ndarray]) -> Transform:
    """A mistake made with every value by itself: float32 in, float32 out."""

    def transform(weights: Weights, name: str) -> LazyTensor:
        return MappedRows(weights[name], lambda rows: function(to_float32(rows)), FLOAT32)

    return transform
