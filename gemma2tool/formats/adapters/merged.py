"""Weights with adapters merged in, computed while their rows are read.

A merged row is ``W + s * B A`` in float32, rounded only by the output to the type that it stores. DoRA then gives each
row the length of its magnitude. An initialization that moved a part of W into B A before training is undone: the
merged weight is ``W - start + s * B A``.
"""

from __future__ import annotations

import threading

import numpy as np

from gemma2tool.formats.adapters.adapter import Delta, TokenRows
from gemma2tool.model.lazy import FLOAT32, Array, DType, LazyTensor, to_float32

TILE = 64
"""Rows multiplied at once, from multiples of it: a product's last bits may depend on its shape, and must not depend on
the range.
"""


class MergedTensor(LazyTensor):
    """A weight with adapters merged in, float32. An output stores it in the weight's own type unless another is asked
    for.
    """

    dtype = FLOAT32

    def __init__(self, base: LazyTensor, deltas: tuple[Delta, ...]) -> None:
        self.base, self.deltas = base, deltas
        self.shape, self.stored = base.shape, base.stored
        self.origin = f"{base.origin} with {len(deltas)} adapter{'s' if len(deltas) > 1 else ''}"
        self._factors = [delta.factors() for delta in deltas]
        self._starts: dict[int, tuple[Array, Array]] = {}
        self._lock = threading.Lock()

    @classmethod
    def with_delta(cls, base: LazyTensor, delta: Delta) -> MergedTensor:
        """``base`` with one more adapter."""
        if isinstance(base, MergedTensor):
            return cls(base.base, (*base.deltas, delta))
        return cls(base, (delta,))

    @property
    def stored_dtype(self) -> DType:
        return min(self.base.stored_dtype, FLOAT32, key=lambda dtype: dtype.itemsize)

    def load_rows(self, first: int, last: int) -> Array:
        rows = to_float32(self.base.load_rows(first, last)).copy()
        for index, (delta, (left, right)) in enumerate(zip(self.deltas, self._factors, strict=True)):
            if delta.start is not None:
                rows -= np.float32(delta.strength) * self._product_rows(*self._start(index), first, last)
            rows += np.float32(delta.scaling) * self._product_rows(left, right, first, last)
            if delta.magnitude is not None:
                lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
                rows *= (delta.magnitude.load_rows_f32(first, last) / lengths)[:, None]
        return rows

    def _product_rows(self, left: Array, right: Array, first: int, last: int) -> Array:
        """Rows ``first`` to ``last`` of ``left @ right``, whole tiles at a time."""
        start, end = first // TILE * TILE, min(-(-last // TILE) * TILE, self.rows)
        product = np.empty((end - start, right.shape[1]), FLOAT32)
        for offset in range(start, end, TILE):
            factor = left[offset : min(offset + TILE, end)]
            tile = np.zeros((TILE, left.shape[1]), FLOAT32)
            tile[: len(factor)] = factor
            product[offset - start : offset - start + len(factor)] = (tile @ right)[: len(factor)]
        return product[first - start : last - start]

    def _start(self, index: int) -> tuple[Array, Array]:
        """The factors of what an adapter's initialization took out of the base, computed when first asked for."""
        with self._lock:
            if index not in self._starts:
                delta = self.deltas[index]
                matrix = to_float32(self.base.load())
                if delta.start == "pissa":
                    self._starts[index] = principal_part(matrix, delta.rank)
                else:
                    left, right = leading_columns_part(matrix, delta.rank)
                    self._starts[index] = (np.float32(delta.start_scaling) * left, right)
            return self._starts[index]


def principal_part(matrix: Array, rank: int) -> tuple[Array, Array]:
    """Factors of the best approximation of ``matrix`` (out, in) of a rank: PiSSA's start.

    It is the projection on the leading singular vectors of the shorter side, which are eigenvectors of a Gram matrix.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    exact = matrix.astype(np.float64)
    vectors = np.linalg.eigh(exact @ exact.T if wide else exact.T @ exact)[1][:, -rank:]
    if wide:
        return vectors.astype(FLOAT32), (vectors.T @ exact).astype(FLOAT32)
    return (exact @ vectors).astype(FLOAT32), np.ascontiguousarray(vectors.T.astype(FLOAT32))


def leading_columns_part(matrix: Array, rank: int) -> tuple[Array, Array]:
    """Factors of ``Q[:, :rank] @ R[:rank]`` of the QR decomposition of ``matrix``: OLoRA's start before its scaling.

    Those columns of Q span the first columns of the matrix, so that it is a projection on them.
    """
    exact = matrix.astype(np.float64)
    vectors = np.linalg.qr(exact[:, :rank])[0]
    return vectors.astype(FLOAT32), (vectors.T @ exact).astype(FLOAT32)


class ReplacedRows(LazyTensor):
    """A matrix in which an adapter trained some rows alone."""

    def __init__(self, base: LazyTensor, rows: TokenRows) -> None:
        self.base, self.token_rows = base, rows
        self.dtype = base.dtype if rows.values.dtype == base.dtype else FLOAT32
        self.shape, self.stored = base.shape, base.stored
        self.origin = f"{base.origin} with {len(rows.indices)} trained rows"
        self._values = rows.values.load().astype(self.dtype)

    @property
    def stored_dtype(self) -> DType:
        return min(self.base.stored_dtype, self.dtype, key=lambda dtype: dtype.itemsize)

    def load_rows(self, first: int, last: int) -> Array:
        rows = self.base.load_rows(first, last).astype(self.dtype, copy=True)
        for index, value in zip(self.token_rows.indices, self._values, strict=True):
            if first <= index < last:
                rows[index - first] = value
        return rows
