"""Which mistake, or which two in turn, make the candidate's tensors of the source's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import permutations, product

import numpy as np

from gemma2tool.model.lazy import LazyTensor
from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.diagnosis import attention, embedding, mlp, norms, numbers, transposed
from gemma2tool.verify.diagnosis.fit import Fit, allowed, explains, fit_sample, fit_whole, is_float, sampled, signal_of
from gemma2tool.verify.diagnosis.names import EMBEDDINGS, name_of, place
from gemma2tool.verify.diagnosis.signature import Move, Signature, Step, Weights

SIGNATURES: tuple[Signature, ...] = (
    *norms.SIGNATURES,
    *numbers.SIGNATURES,
    *attention.SIGNATURES,
    *mlp.SIGNATURES,
    *embedding.SIGNATURES,
    *transposed.SIGNATURES,
)
"""The mistakes that are a function of tensors. What happens to be the same by symmetry goes to the first."""

_CONFIRMED = 3  # of the suppositions that fit a sample, how many are held against the whole tensor
_COSTLY_VALUES = 1 << 26  # of a tensor, up to which mistakes that need all of it are tried in twos
_PATIENCE = 6  # tensors in a row that no two mistakes explain, after which two are not looked for any more


@dataclass(frozen=True)
class Explanation:
    """The mistakes that turn the source's tensors into the candidate's, in the order in which they were made."""

    steps: tuple[Step, ...]
    fit: Fit


@dataclass
class Case:
    """``weights``: the source's tensors as the target's own conventions leave them, ``originals``: as they are; the candidate's, and
    what comparing them has found."""

    weights: Weights
    originals: Weights
    candidate: Mapping[str, LazyTensor]
    comparisons: Mapping[str, TensorComparison] = field(default_factory=dict)
    weighted: bool = False
    threads: int = 1
    _samples: dict[str, list[np.ndarray]] = field(default_factory=dict)
    _errors: dict[str, float] = field(default_factory=dict)

    def sample(self, name: str) -> list[np.ndarray]:
        """A few rows of the candidate's tensor; see ``fit.sample_ranges``."""
        if name not in self._samples:
            tensor = self.candidate[name]
            self._samples[name] = sampled(tensor, tensor.shape)
        return self._samples[name]

    def unexplained(self, name: str) -> float:
        """The sample's error against the source's own tensor; infinite where shapes differ or the source has none."""
        if name not in self._errors:
            source = self.weights.get(name)
            fits = source is not None and source.shape == self.candidate[name].shape
            self._errors[name] = self.fit(source, name).error if fits else float("inf")
        return self._errors[name]

    def fit(self, supposed: LazyTensor, name: str, most: float = math.inf) -> Fit:
        return fit_sample(supposed, self.candidate[name], self.sample(name), most)

    def limit(self, supposed: LazyTensor, name: str) -> float:
        return allowed(self.originals.get(name, supposed), self.candidate[name], self.weighted)

    def holds(self, fit: Fit, supposed: LazyTensor, name: str) -> bool:
        return explains(fit, self.unexplained(name), self.limit(supposed, name), self.candidate[name])

    def confirmed(self, supposed: LazyTensor, name: str) -> Fit | None:
        """The fit to the whole tensor; None where it does not hold there."""
        fit = fit_whole(supposed, self.candidate[name], self.threads)
        return fit if self.holds(fit, supposed, name) else None

    def best(self, name: str, suppositions: Iterable[tuple[Step, ...]]) -> Explanation | None:
        """The first supposition that reproduces every bit, else the one that comes nearest within rounding."""
        near: list[tuple[float, int, tuple[Step, ...], LazyTensor]] = []
        signal = signal_of(self.sample(name))
        bases = (self.weights,)
        if self.weights.get(name) is not self.originals.get(name):  # a convention that came after the mistake
            bases = (self.weights, self.originals)
        for order, (steps, weights) in enumerate(product(suppositions, bases)):
            supposed = self.build(steps, name, weights)
            if supposed is None or supposed.shape != self.candidate[name].shape:
                continue
            fit = self.fit(supposed, name, self.limit(supposed, name) ** 2 * signal)
            if not self.holds(fit, supposed, name) or (_exact(steps) and not fit.exact):
                continue
            if not fit.exact:
                near.append((fit.error, order, steps, supposed))
            elif (whole := self.confirmed(supposed, name)) and (whole.exact or not _exact(steps)):
                return Explanation(steps, whole)
        for _, _, steps, supposed in sorted(near, key=lambda each: each[:2])[:_CONFIRMED]:
            if whole := self.confirmed(supposed, name):
                return Explanation(steps, whole)
        return None

    def build(self, steps: tuple[Step, ...], name: str, weights: Weights) -> LazyTensor | None:
        """The tensor called ``name`` after the mistakes ``steps``; None where they cannot be made."""
        found = self.comparisons.get(name)
        for step in steps:
            if isinstance(step, Signature) and step.needs and (found is None or not step.needs(found)):
                return None
        for step in steps[:-1]:
            weights = weights.after(step, name)
        return steps[-1].of(weights, name)


def _exact(steps: tuple[Step, ...]) -> bool:
    return any(isinstance(step, Signature) and step.exact for step in steps)


def search(case: Case, names: Iterable[str]) -> dict[str, Explanation]:
    """Explanations of those of the candidate's tensors that one mistake accounts for, or two."""
    found: dict[str, Explanation] = {}
    names = list(names)
    for suppositions, patience in ((_single, len(names)), (_double, _PATIENCE)):
        recent: dict[tuple[Step | tuple[str, str, int], ...], None] = {}
        for name in [each for each in names if each not in found]:
            explanation = case.best(name, _recalled(recent, name))
            if explanation is None and patience:
                explanation = case.best(name, suppositions(case, name))
                patience = patience - 1 if explanation is None else max(patience, _PATIENCE)
            if explanation is not None:
                found[name] = _refined(case, name, explanation)
                recent.setdefault(_remembered(found[name].steps, name))
    return found


def _refined(case: Case, name: str, explanation: Explanation) -> Explanation:
    """With a rounding after it, where that makes a mistake that comes near reproduce every bit."""
    if explanation.fit.exact or not is_float(case.candidate[name]) or _exact(explanation.steps):
        return explanation
    rounded = ((*explanation.steps, each) for each in _signatures(case, name) if each.exact)
    exact = case.best(name, rounded)
    return exact if exact is not None and exact.fit.exact else explanation


# -- what may have been done ---------------------------------------------------------------------------------------------


def _single(case: Case, name: str) -> Iterator[tuple[Step, ...]]:
    cheap = [each for each in _signatures(case, name) if not each.costly]
    yield from ((each,) for each in cheap)
    yield from ((each,) for each in _moves(case, name))
    yield from ((each,) for each in _signatures(case, name) if each.costly)


def _double(case: Case, name: str) -> Iterator[tuple[Step, ...]]:
    """Two mistakes in turn: in the same tensor, or in one that then took another's place."""
    small = case.candidate[name].size <= _COSTLY_VALUES
    signatures = [each for each in _signatures(case, name) if small or not each.costly]
    for first, second in permutations(signatures, 2):
        if first.id != second.id:
            yield first, second
    for move in _moves(case, name):
        yield from ((first, move) for first in _signatures(case, move.origin) if small or not first.costly)
        yield from ((move, second) for second in signatures)


def _signatures(case: Case, name: str) -> list[Signature]:
    kind = place(name).kind
    fitting = [each for each in SIGNATURES if not each.kinds or kind in each.kinds]
    source, rows = case.weights.get(name), case.candidate[name].rows if name in case.candidate else 0
    if kind in EMBEDDINGS and source is not None and rows and source.rows != rows:
        fitting.insert(0, embedding.resized(source.rows, rows))
    return fitting


def _moves(case: Case, name: str) -> list[Move]:
    """Tensors of the source of the same shape: of the same layer first, then of the same kind, then any."""
    here, shape = place(name), case.candidate[name].shape
    others = [each for each, tensor in case.weights.items() if each != name and tensor.shape == shape]

    def distance(other: str) -> tuple[bool, bool, int]:
        there = place(other)
        apart = abs(there.layer - here.layer) if None not in (there.layer, here.layer) else 0
        return there.layer != here.layer, there.kind != here.kind, apart

    return [Move(each) for each in sorted(others, key=distance)]


# -- what explained one tensor is tried first with the next --------------------------------------------------------------


def _remembered(steps: tuple[Step, ...], name: str) -> tuple[Step | tuple[str, str, int], ...]:
    """The steps, with a move as where it came from relative to ``name``."""
    here = place(name)
    kept: list[Step | tuple[str, str, int]] = []
    for step in steps:
        if isinstance(step, Move):
            there = place(step.origin)
            kept.append((here.kind, there.kind, (there.layer or 0) - (here.layer or 0)))
        else:
            kept.append(step)
    return tuple(kept)


def _recalled(recent: Iterable[tuple[Step | tuple[str, str, int], ...]], name: str) -> Iterator[tuple[Step, ...]]:
    here = place(name)
    for kept in recent:
        steps: list[Step] = []
        for step in kept:
            if isinstance(step, tuple):
                kind, origin, offset = step
                layer = None if here.layer is None else here.layer + offset
                if kind == origin:
                    origin = here.kind
                elif kind != here.kind:
                    break
                steps.append(Move(name_of(origin, layer)))
            else:
                steps.append(step)
        else:
            yield tuple(steps)
