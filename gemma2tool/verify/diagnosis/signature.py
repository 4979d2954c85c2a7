"""A signature: what a mistake turns the source's tensors into, and the sentence that describes it.

A mistake is written once, as the function that makes it. Whether it happened is then a comparison of the function's
result with the candidate's tensor. Two mistakes in one tensor are one function applied after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import FLOAT32, Array, LazyTensor, MappedRows, to_float32
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

    def siblings(self, name: str, kinds: tuple[str, ...]) -> list[LazyTensor] | None:
        """The tensors of ``kinds`` in the layer of ``name``; None where one is missing."""
        tensors = [self.get(name_of(kind, place(name).layer)) for kind in kinds]
        present = [tensor for tensor in tensors if tensor is not None]
        return present if len(present) == len(tensors) else None

    def after(self, mistake: Mistake, name: str) -> Weights:
        """The weights after ``mistake`` was made with every tensor that it concerns.

        A move is made with ``name`` and, if it is a move between layers, with the other tensors of its layer.
        """
        return Weights(_MistakenTensors(self, mistake, name), self.config)


class _MistakenTensors(Mapping[str, LazyTensor]):
    def __init__(self, weights: Weights, mistake: Mistake, name: str) -> None:
        self.weights, self.mistake, self.name = weights, mistake, name

    def __getitem__(self, name: str) -> LazyTensor:
        if isinstance(self.mistake, Move):
            return self.weights[self._origin(self.mistake, name)]
        result = self.mistake.apply(self.weights, name)
        return self.weights[name] if result is None else result

    def _origin(self, move: Move, name: str) -> str:
        if name == self.name:
            return move.origin
        target, origin, requested = place(self.name), place(move.origin), place(name)
        moves_along = target.kind == origin.kind and target.layer == requested.layer is not None
        return name_of(requested.kind, origin.layer) if moves_along else name

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


Transform = Callable[[Weights, str], LazyTensor | None]
"""The tensor of that name after the mistake; None where the mistake cannot be made with it."""


@dataclass(frozen=True)
class Signature:
    """One known mistake.

    ``id``: its name in the catalog. ``kinds``: of the tensors that it concerns; empty: any. ``template``: the sentence,
    see ``names.fill``. ``exact``: only a tensor reproduced bit for bit counts, because the mistake is itself a
    rounding. ``needs``: what the comparison of the tensor must have found. ``costly``: a few rows of the result need
    the whole source, so it is tried last.
    """

    id: str
    kinds: tuple[str, ...]
    template: str
    transform: Transform
    exact: bool = False
    needs: Callable[[TensorComparison], bool] | None = None
    costly: bool = False

    def apply(self, weights: Weights, name: str) -> LazyTensor | None:
        """The tensor ``name`` after the mistake; None where it cannot be made."""
        if self.kinds and place(name).kind not in self.kinds:
            return None
        return self.transform(weights, name) if name in weights else None


@dataclass(frozen=True)
class Move:
    """The tensor holds the one that belongs under the name ``origin``."""

    origin: str

    def apply(self, weights: Weights, name: str) -> LazyTensor | None:
        return weights.get(self.origin)


Mistake = Signature | Move


def elementwise(function: Callable[[Array], Array]) -> Transform:
    """A mistake made with every value independently: float32 in, float32 out."""

    def transform(weights: Weights, name: str) -> LazyTensor:
        return MappedRows(weights[name], lambda rows: function(to_float32(rows)), FLOAT32)

    return transform
