"""H = X^T X of a matrix's inputs, summed batch by batch, and the Cholesky factor of its inverse, which GPTQ uses."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma2tool.quantizers.calibration import Map

PANEL = 512
"""Columns of H in a piece of work."""

LEAF = 256
"""The largest triangular matrix that LAPACK inverts; larger ones are split in half."""


class Hessian:
    """H (I, I) in float32, and the sum of |x| per column (I,) in float64.

    ``block``: keep only blocks of this many columns on the diagonal, as if columns of different blocks were
    independent; memory and time are divided by their number. Only the lower triangle is summed. ``device``: where sums
    and factors are computed. ``share``: (index, count): of every ``count`` panels, sum only the one at ``index``; the
    others are summed elsewhere.
    """

    def __init__(
        self,
        columns: int,
        block: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        share: tuple[int, int] = (0, 1),
    ) -> None:
        width = min(block or columns, columns)
        self.columns = columns
        self.spans = [slice(start, min(start + width, columns)) for start in range(0, columns, width)]
        sizes = [span.stop - span.start for span in self.spans]
        self.squares = [torch.zeros(size, size, dtype=dtype, device=device) for size in sizes]
        self.magnitude = torch.zeros(columns, dtype=torch.float64, device=device)
        self.count = 0
        self._share = share

    def to(self, device: torch.device | str) -> Hessian:
        """These sums, moved to ``device``."""
        self.squares = [square.to(device) for square in self.squares]
        self.magnitude = self.magnitude.to(device)
        return self

    def add(self, x: Tensor, run: Map = map) -> None:
        """Add inputs (tokens, I)."""
        first, step = self._share

        def panel(piece: tuple[Tensor, slice, int]) -> None:
            square, span, start = piece
            columns = x[:, span]
            square[start:, start : start + PANEL].addmm_(columns[:, start:].T, columns[:, start : start + PANEL])

        for _ in run(panel, self._pieces()[first::step]):
            pass
        self.magnitude += x.abs().sum(0, dtype=torch.float64)
        self.count += len(x)

    def panels(self) -> list[Tensor]:
        """The panels of columns that are summed one by one, down from the diagonal."""
        return [square[start:, start : start + PANEL] for square, _, start in self._pieces()]

    @property
    def is_finite(self) -> bool:
        """Whether the sums of squares are finite, from which the others follow."""
        return all(bool(torch.isfinite(square.diagonal()).all()) for square in self.squares)

    def packed(self) -> NDArray[np.float32]:
        """The panels, one after the other, in main memory: the lower triangles and little else."""
        return torch.cat([panel.flatten() for panel in self.panels()]).cpu().numpy()

    def unpack(self, packed: NDArray[np.float32]) -> None:
        """Take over the values that ``packed`` returned."""
        values = torch.from_numpy(packed)
        for panel in self.panels():
            own, values = values[: panel.numel()], values[panel.numel() :]
            panel.copy_(own.view(panel.shape))

    def _pieces(self) -> list[tuple[Tensor, slice, int]]:
        return [
            (square, span, start)
            for square, span in zip(self.squares, self.spans, strict=True)
            for start in range(0, len(square), PANEL)
        ]

    @property
    def mean_magnitude(self) -> Tensor:
        """Mean |x| per column, float64 (I,), in main memory."""
        return self.magnitude.cpu() / self.count

    def symmetrize(self) -> None:
        """Copy the lower triangles to the upper ones."""
        for square in self.squares:
            for start in range(0, len(square), PANEL):
                end = min(start + PANEL, len(square))
                diagonal = square[start:end, start:end]
                diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)
                square[start:end, end:] = square[end:, start:end].T


NewHessian = Callable[..., Hessian]
"""Makes an empty Hessian, with the parameters of ``Hessian``."""


def packed_size(columns: int, block: int | None) -> int:
    """Values that ``Hessian.packed`` returns."""
    width = min(block or columns, columns)
    sizes = (min(width, columns - start) for start in range(0, columns, width))
    return sum((size - start) * min(PANEL, size - start) for size in sizes for start in range(0, size, PANEL))


@dataclass(frozen=True)
class Factor:
    """``upper`` U with U^T U = (H + damping)^-1 of the ``columns`` (indices into the matrix, in the order of
    rounding). What follows from it is computed once, whichever thread asks first: ``cached_property`` alone does not
    make the others wait.
    """

    columns: Tensor
    upper: Tensor
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @property
    def row_major(self) -> Tensor:
        """``upper`` with each row contiguous, as the kernels read it."""
        with self._lock:
            return self._row_major

    @property
    def hessian(self) -> Tensor:
        """H + damping, in the order of rounding."""
        with self._lock:
            return self._hessian

    @functools.cached_property
    def _row_major(self) -> Tensor:
        return self.upper.contiguous()

    @functools.cached_property
    def _hessian(self) -> Tensor:
        lower = self.upper.T.contiguous()
        invert_lower_(lower)
        return lower.T @ lower


def inverse_factors(hessian: Hessian, damping: float, act_order: bool) -> list[Factor]:
    """A factor for each block on the diagonal, in main memory. Empties ``hessian``.

    ``damping``: this fraction of the diagonal's mean is added to the diagonal; where that is not enough, ten times as
    much. ``act_order``: columns are rounded from the largest diagonal element to the smallest, else from left to right.
    """
    hessian.symmetrize()
    factors = []
    while hessian.squares:
        square, span = hessian.squares.pop(0), hessian.spans.pop(0)
        columns = torch.arange(span.start, span.stop)
        diagonal = square.diagonal()
        diagonal[diagonal == 0] = 1  # the inputs of the column were all zero: it is rounded by itself
        if act_order:
            order = torch.argsort(diagonal, descending=True, stable=True)
            square, columns = square[order][:, order], columns[order.cpu()]
        square = square.flip(0, 1)
        factors.append(Factor(columns, inverse_factor(square, damping).cpu()))
    return factors


def inverse_factor(reverse: Tensor, damping: float) -> Tensor:
    """The upper triangular U with U^T U = (h + damping * mean(diag h))^-1. ``reverse``: h with rows and columns in
    reverse order.

    Reversed, h is L L^T with L lower triangular, so h is R R^T with R upper triangular, and U is R^-1: one
    factorization and one triangular inverse, where the usual way takes two of each. Overwrites ``reverse``. Raises
    ``torch.linalg.LinAlgError`` if h is still not positive definite with its mean diagonal as damping.
    """
    mean, added = reverse.diagonal().mean(), 0.0
    while True:
        reverse.diagonal().add_((damping - added) * mean)
        lower, failed = torch.linalg.cholesky_ex(reverse)
        if not failed:
            break
        damping, added = 10 * damping, damping
        if damping > 1:
            # torch does not declare the re-export of this name.
            raise torch.linalg.LinAlgError("the Hessian has no Cholesky factor at any damping")  # type: ignore[attr-defined]
    invert_lower_(lower)
    upper: Tensor = lower.flip(0, 1)
    return upper


def invert_lower_(lower: Tensor) -> None:
    """Invert a lower triangular matrix in place, recursively by halves."""
    size = len(lower)
    if size <= LEAF:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = size // 2
    first, second, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    invert_lower_(first)
    invert_lower_(second)
    below.copy_(second @ below @ first)
    below.neg_()
