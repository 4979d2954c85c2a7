"""Transforms that change a matrix's layout, between Gemma 2's tensors and those of frameworks that order axes
otherwise.

They work on matrices. A disk tensor of more axes is the matrix of its last axis' rows: query heads stored as (H, D,
h) are the (H * D, h) matrix with the same bytes. Sizes are products of the tensor table's symbols and numbers: "H",
"2*K".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma2tool.formats.mapping.blockwise import BlockwiseTensor
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import Array, LazyTensor, RowRange, row_ranges
from gemma2tool.model.tensors import dimension_sizes

LOAD_BYTES = 8 << 20
SPARE_ROWS = 512
"""Rows that may be read beyond the requested ones, to get scattered rows in one read: about two heads."""

RowOrder = NDArray[np.int64]


def axis_size(dims: str, config: Gemma2Config) -> int:
    """The value of "2*K" or "h" for this config."""
    sizes = dimension_sizes(config)
    product = 1
    for factor in dims.split("*"):
        product *= int(factor) if factor.isdigit() else sizes[factor]
    return product


def axis_sizes(dims: tuple[str, ...], config: Gemma2Config) -> tuple[int, ...]:
    """The shape with the axes ``dims``, such as ("H", "D", "h"), for this config."""
    return tuple(axis_size(dim, config) for dim in dims)


@dataclass(frozen=True)
class TransposeBlocks:
    """Transposes each of ``count`` equal blocks of rows: (n * a, b) to (n * b, a). "1" transposes the whole matrix."""

    count: str = "1"
    exact: bool = True

    def apply(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor:
        count = axis_size(self.count, config)
        if isinstance(tensor, BlocksTransposed) and tensor.count == count:
            return tensor.source
        return BlocksTransposed(tensor, count)

    invert = apply


class BlocksTransposed(BlockwiseTensor):
    """See ``TransposeBlocks``. A block is read whole and kept until its rows have been read."""

    def __init__(self, source: LazyTensor, count: int) -> None:
        rows, columns = source.shape if len(source.shape) == 2 else (0, 0)
        if rows % count:
            raise ValueError(f"{count} blocks of {source}")
        self.source, self.count = source, count
        self.shape = (count * columns, rows // count)
        self.dtype, self.stored, self.origin = source.dtype, source.stored, source.origin
        self.block_rows = columns

    def announce(self, first: int = 0, last: int | None = None) -> None:
        self.source.announce()

    def load_block(self, index: int) -> Array:
        rows = self.shape[1]
        offset = index * rows
        block = np.empty((rows, self.block_rows), self.dtype)
        for first, last in row_ranges(rows, self.block_rows * self.dtype.itemsize, LOAD_BYTES):
            block[first:last] = self.source.load_rows(offset + first, offset + last)
        return block.T


class PermuteRows(ABC):
    """Another order of the rows. ``order(config)[r]`` is the canonical row that row ``r`` on disk holds."""

    exact = True

    @abstractmethod
    def order(self, config: Gemma2Config) -> RowOrder:
        """Integers (rows,)."""

    def apply(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor:
        return PermutedRows(tensor, self.order(config))

    def invert(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor:
        return PermutedRows(tensor, np.argsort(self.order(config)))


class PermutedRows(LazyTensor):
    """Rows of ``source`` in another order; ``order[r]`` is the source's row."""

    def __init__(self, source: LazyTensor, order: RowOrder) -> None:
        if source.shape[:1] != order.shape:
            # The check against the tensor table reports it, because it sees the shape unchanged.
            order = np.arange(source.rows)
        self.source, self.order = source, order
        self.shape, self.dtype, self.stored, self.origin = source.shape, source.dtype, source.stored, source.origin

    def announce(self, first: int = 0, last: int | None = None) -> None:
        self.source.announce()

    def load_rows(self, first: int, last: int) -> Array:
        indices = self.order[first:last]
        if not len(indices):
            return self.source.load_rows(first, last)
        low, high = int(indices.min()), int(indices.max()) + 1
        if high - low <= len(indices) + SPARE_ROWS:
            rows: Array = self.source.load_rows(low, high)[indices - low]
            return rows
        runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
        return np.concatenate([self.source.load_rows(int(run[0]), int(run[-1]) + 1) for run in runs])


@dataclass(frozen=True)
class InterleaveRotary(PermuteRows):
    """Each head's rows in the order of interleaved rotary pairs (0, h/2, 1, h/2 + 1, ...); the canonical form has
    halves.

    ``heads``: how many heads the matrix has.
    """

    heads: str

    def order(self, config: Gemma2Config) -> RowOrder:
        heads, half = axis_size(self.heads, config), config.head_dim // 2
        return np.arange(heads * 2 * half).reshape(heads, 2, half).swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True)
class GroupByKeyValueHead(PermuteRows):
    """q, k and v stacked by kv head: its query heads, its key, its value, instead of all q, all k, all v."""

    def order(self, config: Gemma2Config) -> RowOrder:
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        rows = np.arange((heads + 2 * kv_heads) * dim)
        parts = np.split(rows, [heads * dim, (heads + kv_heads) * dim])
        return np.concatenate([part.reshape(kv_heads, -1) for part in parts], axis=1).reshape(-1)


@dataclass(frozen=True)
class PadVocabulary:
    """Zero rows after the embedding, up to the next multiple of 128 above the vocabulary: 256128 for the released
    models.

    Reading removes up to 128 rows, whatever they hold.
    """

    exact: bool = True

    def apply(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor:
        return PaddedRows(tensor, padded_vocabulary(config.vocab_size))

    def invert(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor:
        rows = config.vocab_size
        return RowRange(tensor, 0, rows) if rows < tensor.rows <= padded_vocabulary(rows) else tensor


def padded_vocabulary(rows: int) -> int:
    """Rows of a padded embedding for a vocabulary of ``rows``."""
    return (rows // 128 + 1) * 128


class PaddedRows(LazyTensor):
    """``source`` with zero rows after it."""

    def __init__(self, source: LazyTensor, rows: int) -> None:
        self.source = source
        self.shape = (rows, *source.shape[1:])
        self.dtype, self.stored, self.origin = source.dtype, source.stored, source.origin

    def load_rows(self, first: int, last: int) -> Array:
        end = min(last, self.source.rows)
        if last <= end:
            return self.source.load_rows(first, last)
        rows = np.zeros((last - first, *self.shape[1:]), self.dtype)
        if first < end:
            rows[: end - first] = self.source.load_rows(first, end)
        return rows


class WideRows(LazyTensor):
    """The matrix with the same values whose rows are ``count`` rows of ``source``, one after the other."""

    def __init__(self, source: LazyTensor, count: int) -> None:
        self.source, self.count = source, count
        self.shape = (source.rows // count, count * source.row_size)
        self.dtype, self.stored, self.origin = source.dtype, source.stored, source.origin

    def load_rows(self, first: int, last: int) -> Array:
        return self.source.load_rows(first * self.count, last * self.count).reshape(last - first, -1)
