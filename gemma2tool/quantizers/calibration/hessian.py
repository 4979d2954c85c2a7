"""H = X^T X of a matrix's inputs, summed batch by batch, and the factor of its inverse that GPTQ goes by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma2tool.quantizers.calibration import Map

PANEL = 512
"""Columns of H that are one piece of work."""

LEAF = 256
"""Up to here a triangular matrix is inverted by LAPACK, above by halves."""


class Hessian:
    """H (I, I) in float32, and the sum of |x| per column (I,) in float64.

    ``block``: keep only squares of this many columns on the diagonal, as if columns of different squares were independent; memory
    and time go down by their number. Only the lower triangle is summed.
    """

    def __init__(self, columns: int, block: int | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        width = min(block or columns, columns)
        self.columns = columns
        self.spans = [slice(start, min(start + width, columns)) for start in range(0, columns, width)]
        self.squares = [torch.zeros(span.stop - span.start, span.stop - span.start, dtype=dtype) for span in self.spans]
        self.magnitude = torch.zeros(columns, dtype=torch.float64)
        self.count = 0

    def add(self, x: Tensor, run: Map = map) -> None:
        """Add inputs (tokens, I)."""
        pieces = [
            (square, span, start)
            for square, span in zip(self.squares, self.spans, strict=True)
            for start in range(0, len(square), PANEL)
        ]

        def panel(piece: tuple[Tensor, slice, int]) -> None:
            square, span, start = piece
            columns = x[:, span]
            square[start:, start : start + PANEL].addmm_(columns[:, start:].T, columns[:, start : start + PANEL])

        for _ in run(panel, pieces):
            pass
        self.magnitude += x.abs().sum(0, dtype=torch.float64)
        self.count += len(x)

    @property
    def mean_magnitude(self) -> Tensor:
        """Mean |x| per column, float64 (I,)."""
        return self.magnitude / self.count

    def symmetrize(self) -> None:
        """Mirror the lower triangles, so that the squares can be multiplied with."""
        for square in self.squares:
            for start in range(0, len(square), PANEL):
                end = min(start + PANEL, len(square))
                diagonal = square[start:end, start:end]
                diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)
                square[start:end, end:] = square[end:, start:end].T


@dataclass(frozen=True)
class Factor:
    """``upper`` U with U^T U = (H + damping)^-1 of the ``columns`` (indices into the matrix, in the order of rounding)."""

    columns: Tensor
    upper: Tensor


def inverse_factors(hessian: Hessian, damping: float, act_order: bool) -> list[Factor]:
    """One for each square on the diagonal. The Hessian is used up.

    ``damping``: this fraction of the mean of the diagonal is added to it, and ten times as much wherever that was not enough. With
    ``act_order`` columns are rounded from the largest diagonal element to the smallest, else from left to right.
    """
    hessian.symmetrize()
    found = []
    while hessian.squares:
        square, span = hessian.squares.pop(0), hessian.spans.pop(0)
        columns = torch.arange(span.start, span.stop)
        diagonal = square.diagonal()
        diagonal[diagonal == 0] = 1  # no input ever reached the column: nothing is known of it, and it stands alone
        if act_order:
            order = torch.argsort(diagonal, descending=True, stable=True)
            square, columns = square[order][:, order], columns[order]
        square = square.flip(0, 1)
        found.append(Factor(columns, inverse_factor(square, damping)))
    return found


def inverse_factor(reverse: Tensor, damping: float) -> Tensor:
    """Upper triangular U with U^T U = (h + damping * mean(diag h))^-1, of an h given with its rows and columns in reverse order.

    In that order h is L L^T with L lower triangular; in its own, that is R R^T with R upper triangular, and U is R^-1: one
    factorization and one triangular inverse, where the usual way takes two and two. ``reverse`` is used up. Raises
    ``torch.linalg.LinAlgError`` if h is so far from positive definite that no damping up to its mean diagonal helps.
    """
    mean, added = reverse.diagonal().mean(), 0.0
    while True:
        reverse.diagonal().add_((damping - added) * mean)
        lower, failed = torch.linalg.cholesky_ex(reverse)
        if not failed:
            break
        damping, added = 10 * damping, damping
        if damping > 1:
            raise torch.linalg.LinAlgError("the Hessian has no Cholesky factor, whatever the damping")
    invert_lower_(lower)
    return lower.flip(0, 1)


def invert_lower_(lower: Tensor) -> None:
    """Invert a lower triangular matrix in its own memory, by halves."""
    size = len(lower)
    if size <= LEAF:
        eye = torch.eye(size, dtype=lower.dtype)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = size // 2
    first, second, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    invert_lower_(first)
    invert_lower_(second)
    below.copy_(second @ below @ first)
    below.neg_()
