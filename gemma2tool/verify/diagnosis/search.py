"""Which mistake, or which two mistakes in turn, turn the source's tensors into the candidate's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import permutations, product

from gemma2tool.model.format_facts import Rounding
from gemma2tool.model.lazy import Array, LazyTensor
from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.diagnosis import attention, embedding, mlp, norms, numbers, transposed
from gemma2tool.verify.diagnosis.fit import (
    Fit,
    error_limit,
    explains,
    fit_sample,
    fit_whole,
    is_float,
    sampled,
    signal_of,
)
from gemma2tool.verify.diagnosis.names import EMBEDDINGS, name_of, place
from gemma2tool.verify.diagnosis.signature import Mistake, Move, Signature, Weights

SIGNATURES: tuple[Signature, ...] = (
    *norms.SIGNATURES,
    *numbers.SIGNATURES,
    *attention.SIGNATURES,
    *mlp.SIGNATURES,
    *embedding.SIGNATURES,
    *transposed.SIGNATURES,
)
"""The mistakes that are a function of tensors. Where two have the same effect by symmetry, the first is reported."""

_MAX_CONFIRMED = 3
"""How many of the mistakes that fit a sample are compared with the whole tensor."""
_MAX_COSTLY_VALUES = 1 << 26
"""Size of a tensor up to which mistakes that need all of it are tried in pairs."""
_PATIENCE = 6
"""After this many tensors in a row that no pair of mistakes explains, pairs are no longer tried."""

Mistakes = tuple[Mistake, ...]


@dataclass(frozen=True)
class Explanation:
    """The mistakes that turn the source's tensor into the candidate's, in the order in which they were made."""

    mistakes: Mistakes
    fit: Fit


@dataclass
class Case:
    """What the diagnosis works on.

    ``weights``: the source's tensors as the target's own conventions leave them; ``originals``: as they are.
    ``candidate``: the candidate's tensors. ``comparisons``: what comparing them found. ``rounding``: how the
    candidate's codes were chosen.
    """

    weights: Weights
    originals: Weights
    candidate: Mapping[str, LazyTensor]
    comparisons: Mapping[str, TensorComparison] = field(default_factory=dict)
    rounding: Rounding = "nearest"
    threads: int = 1
    _samples: dict[str, list[Array]] = field(default_factory=dict)
    _baselines: dict[str, float] = field(default_factory=dict)

    def sample(self, name: str) -> list[Array]:
        """A few rows of the candidate's tensor; see ``fit.sample_ranges``."""
        if name not in self._samples:
            self._samples[name] = sampled(self.candidate[name])
        return self._samples[name]

    def baseline(self, name: str) -> float:
        """The sample's error against the source's own tensor; infinite where shapes differ or the source has none."""
        if name not in self._baselines:
            source = self.weights.get(name)
            comparable = source is not None and source.shape == self.candidate[name].shape
            self._baselines[name] = self.fit(source, name).error if source is not None and comparable else math.inf
        return self._baselines[name]

    def fit(self, supposed: LazyTensor, name: str, max_noise: float = math.inf) -> Fit:
        """``supposed`` against the candidate's sample."""
        return fit_sample(supposed, self.candidate[name], self.sample(name), max_noise)

    def error_limit(self, supposed: LazyTensor, name: str) -> float:
        """The largest error that the candidate's type explains."""
        return error_limit(self.originals.get(name, supposed), self.candidate[name], self.rounding)

    def explained(self, fit: Fit, supposed: LazyTensor, name: str) -> bool:
        """Whether the fit is good enough to explain the candidate's tensor."""
        return explains(fit, self.baseline(name), self.error_limit(supposed, name), self.candidate[name])

    def confirm(self, supposed: LazyTensor, name: str) -> Fit | None:
        """The fit to the whole tensor; None where it does not explain it."""
        fit = fit_whole(supposed, self.candidate[name], self.threads)
        return fit if self.explained(fit, supposed, name) else None

    def best(self, name: str, hypotheses: Iterable[Mistakes]) -> Explanation | None:
        """The first hypothesis that reproduces every bit, else the one that comes closest within rounding."""
        close: list[tuple[float, int, Mistakes, LazyTensor]] = []
        signal = signal_of(self.sample(name))
        bases = [self.weights]
        if self.weights.get(name) is not self.originals.get(name):  # the convention was applied after the mistake
            bases.append(self.originals)
        for order, (mistakes, weights) in enumerate(product(hypotheses, bases)):
            supposed = self.build(mistakes, name, weights)
            if supposed is None or supposed.shape != self.candidate[name].shape:
                continue
            fit = self.fit(supposed, name, self.error_limit(supposed, name) ** 2 * signal)
            if not self.explained(fit, supposed, name) or (_must_be_exact(mistakes) and not fit.exact):
                continue
            if not fit.exact:
                close.append((fit.error, order, mistakes, supposed))
            elif (whole := self.confirm(supposed, name)) and (whole.exact or not _must_be_exact(mistakes)):
                return Explanation(mistakes, whole)
        for _, _, mistakes, supposed in sorted(close, key=lambda entry: entry[:2])[:_MAX_CONFIRMED]:
            if whole := self.confirm(supposed, name):
                return Explanation(mistakes, whole)
        return None

    def build(self, mistakes: Mistakes, name: str, weights: Weights) -> LazyTensor | None:
        """The tensor ``name`` after ``mistakes``; None where they cannot be made."""
        comparison = self.comparisons.get(name)
        for mistake in mistakes:
            if (
                isinstance(mistake, Signature)
                and mistake.needs
                and (comparison is None or not mistake.needs(comparison))
            ):
                return None
        for mistake in mistakes[:-1]:
            weights = weights.after(mistake, name)
        return mistakes[-1].apply(weights, name)


def _must_be_exact(mistakes: Mistakes) -> bool:
    return any(isinstance(mistake, Signature) and mistake.exact for mistake in mistakes)


def search(case: Case, names: Iterable[str]) -> dict[str, Explanation]:
    """Explanations of those of the candidate's tensors ``names`` that one mistake, or two, account for."""
    explanations: dict[str, Explanation] = {}
    names = list(names)
    for hypotheses, patience in ((_single, len(names)), (_double, _PATIENCE)):
        recent: dict[_Remembered, None] = {}
        for name in [name for name in names if name not in explanations]:
            explanation = case.best(name, _recall(recent, name))
            if explanation is None and patience:
                explanation = case.best(name, hypotheses(case, name))
                patience = patience - 1 if explanation is None else max(patience, _PATIENCE)
            if explanation is not None:
                explanations[name] = _refine(case, name, explanation)
                recent.setdefault(_remember(explanations[name].mistakes, name))
    return explanations


def _refine(case: Case, name: str, explanation: Explanation) -> Explanation:
    """The explanation with a rounding added, if that reproduces every bit where the explanation alone only comes
    close."""
    if explanation.fit.exact or not is_float(case.candidate[name]) or _must_be_exact(explanation.mistakes):
        return explanation
    rounded = ((*explanation.mistakes, signature) for signature in _signatures(case, name) if signature.exact)
    exact = case.best(name, rounded)
    return exact if exact is not None and exact.fit.exact else explanation


# -- hypotheses --------------------------------------------------------------------------------------------------------


def _single(case: Case, name: str) -> Iterator[Mistakes]:
    signatures = _signatures(case, name)
    yield from ((signature,) for signature in signatures if not signature.costly)
    yield from ((move,) for move in _moves(case, name))
    yield from ((signature,) for signature in signatures if signature.costly)


def _double(case: Case, name: str) -> Iterator[Mistakes]:
    """Two mistakes in turn: both in this tensor, or one of them a move from another place."""
    small = case.candidate[name].size <= _MAX_COSTLY_VALUES
    signatures = [signature for signature in _signatures(case, name) if small or not signature.costly]
    for first, second in permutations(signatures, 2):
        if first.id != second.id:
            yield first, second
    for move in _moves(case, name):
        yield from ((first, move) for first in _signatures(case, move.origin) if small or not first.costly)
        yield from ((move, second) for second in signatures)


def _signatures(case: Case, name: str) -> list[Signature]:
    kind = place(name).kind
    signatures = [signature for signature in SIGNATURES if not signature.kinds or kind in signature.kinds]
    source, rows = case.weights.get(name), case.candidate[name].rows if name in case.candidate else 0
    if kind in EMBEDDINGS and source is not None and rows and source.rows != rows:
        signatures.insert(0, embedding.resized(source.rows, rows))
    return signatures


def _moves(case: Case, name: str) -> list[Move]:
    """The source's other tensors of the same shape: first those of the same layer, then of the same kind, then any."""
    target, shape = place(name), case.candidate[name].shape
    others = [other for other, tensor in case.weights.items() if other != name and tensor.shape == shape]

    def distance(other: str) -> tuple[bool, bool, int]:
        origin = place(other)
        both_in_layers = origin.layer is not None and target.layer is not None
        apart = abs((origin.layer or 0) - (target.layer or 0)) if both_in_layers else 0
        return origin.layer != target.layer, origin.kind != target.kind, apart

    return [Move(other) for other in sorted(others, key=distance)]


# -- what explained one tensor is tried first with the next ------------------------------------------------------------

_RelativeMove = tuple[str, str, int]
"""Kind of the tensor, kind of its origin, and the layers between them."""
_Remembered = tuple[Signature | _RelativeMove, ...]


def _remember(mistakes: Mistakes, name: str) -> _Remembered:
    """The mistakes, with a move relative to ``name``."""
    target = place(name)
    remembered: list[Signature | _RelativeMove] = []
    for mistake in mistakes:
        if isinstance(mistake, Move):
            origin = place(mistake.origin)
            remembered.append((target.kind, origin.kind, (origin.layer or 0) - (target.layer or 0)))
        else:
            remembered.append(mistake)
    return tuple(remembered)


def _recall(recent: Iterable[_Remembered], name: str) -> Iterator[Mistakes]:
    """The remembered mistakes as they would be made with ``name``."""
    target = place(name)
    for remembered in recent:
        mistakes: list[Mistake] = []
        for entry in remembered:
            if isinstance(entry, tuple):
                kind, origin, offset = entry
                layer = None if target.layer is None else target.layer + offset
                if kind == origin:
                    origin = target.kind
                elif kind != target.kind:
                    break
                mistakes.append(Move(name_of(origin, layer)))
            else:
                mistakes.append(entry)
        else:
            yield tuple(mistakes)
