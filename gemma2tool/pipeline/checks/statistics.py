"""Statistics of every tensor, in one pass over the weights with bounded memory."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray

from gemma2tool.model.lazy import DTYPE_NAMES, Array, LazyTensor, row_ranges
from gemma2tool.model.progress import Advance
from gemma2tool.quantizers.gguf_types import GGUF_TYPES

CHUNK_BYTES = 4 << 20
"""Of float32 values, in each thread."""

ZERO_RUN = 512
"""Consecutive exact zeros that count as a hole. Weights that were pruned to half zeros have runs of about 30."""

NEARLY_ZERO = 1e-4
"""A block whose largest value is this small beside the RMS of the rows around it counts as zero."""

LARGEST_SQUARED = 1e15
"""Above it sums of squares are computed in float64."""

_FLOATS = frozenset(DTYPE_NAMES.values())
_BNB_BLOCKS = {"nf4": 64, "fp4": 64}


@dataclass
class TensorStatistics:
    """What one pass over a tensor tells; counts of values unless something else is said.

    ``nonfinite``, ``zeros``; ``first_nonfinite``: its index. ``minimum``, ``maximum``, ``total_square``: of the finite
    values. ``zero_rows``, ``constant_rows``: rows whose values are all zero, or all equal and not zero. ``hole``: the
    first row with ``ZERO_RUN`` consecutive zeros that is not zero itself. ``zero_blocks`` of ``blocks``: blocks of a
    quantized type without any value to speak of, in rows that are not zero. ``row_squares`` (rows,), ``column_squares``
    (columns,): sums of squares. ``row_hashes`` (rows,): equal for equal rows. ``values``: all of them, float64, of a
    vector.
    """

    shape: tuple[int, ...]
    stored: str
    origin: str
    nonfinite: int = 0
    first_nonfinite: tuple[int, ...] = ()
    zeros: int = 0
    minimum: float = np.inf
    maximum: float = -np.inf
    total_square: float = 0.0
    zero_rows: int = 0
    constant_rows: int = 0
    hole: int | None = None
    blocks: int = 0
    zero_blocks: int = 0
    row_squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    column_squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    row_hashes: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    values: NDArray[np.float64] | None = None

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(-self.minimum, self.maximum, 0.0)

    @property
    def rms(self) -> float:
        return float(np.sqrt(self.total_square / max(self.size - self.nonfinite, 1)))

    @property
    def rms_without_largest(self) -> float:
        """The RMS of all values but the largest one."""
        rest = max(self.total_square - self.largest**2, 0.0)
        return float(np.sqrt(rest / max(self.size - self.nonfinite - 1, 1)))

    @property
    def is_constant(self) -> bool:
        return self.size > 1 and self.nonfinite == 0 and self.minimum == self.maximum

    @property
    def digest(self) -> int:
        """Equal for equal tensors."""
        weights = np.arange(1, 2 * len(self.row_hashes), 2, dtype=np.uint64)
        return int((self.row_hashes * weights).sum())


def is_quantized(tensor: LazyTensor) -> bool:
    return tensor.stored not in _FLOATS


def block_size(tensor: LazyTensor) -> int | None:
    """How many neighboring values of a row share a scale; None for floats and where that is not known."""
    if not is_quantized(tensor):
        return None
    known = GGUF_TYPES.get(tensor.stored.upper())
    size = known.block_elements if known is not None else tensor.group_size or _BNB_BLOCKS.get(tensor.stored)
    return size if size and size > 1 and tensor.row_size % size == 0 else None


def measure_tensors(
    tensors: Mapping[str, LazyTensor], *, threads: int = 1, advance: Advance | None = None
) -> Iterator[tuple[str, TensorStatistics]]:
    """The statistics of each tensor, in order. Reads each row once, about ``CHUNK_BYTES`` at a time in each thread."""
    tasks = [
        (name, tensor, *rows)
        for name, tensor in tensors.items()
        for rows in row_ranges(tensor.rows, 4 * tensor.row_size, CHUNK_BYTES)
    ]

    def one(task: tuple[LazyTensor, int, int]) -> TensorStatistics:
        return _measure(*task)

    with (
        ThreadPoolExecutor(threads, thread_name_prefix="check") as pool,
        closing(cast("Generator[TensorStatistics]", pool.map(one, (task[1:] for task in tasks)))) as parts,
    ):
        whole: list[TensorStatistics] = []
        for number, ((name, tensor, first, last), part) in enumerate(zip(tasks, parts, strict=True), 1):
            whole.append(part)
            if advance is not None:
                advance((last - first) * tensor.row_size * tensor.dtype.itemsize, name)
            if number == len(tasks) or tasks[number][0] != name:
                yield name, _merged(whole)
                whole = []


def _measure(tensor: LazyTensor, first: int, last: int) -> TensorStatistics:
    vector = len(tensor.shape) < 2
    if vector:
        rows = tensor.load_rows_exact(first, last).astype(np.float64).reshape(1, -1)
    else:
        rows = tensor.load_rows_f32(first, last).reshape(last - first, -1)
    part = TensorStatistics(tuple(tensor.shape), tensor.stored, tensor.origin)
    if vector:
        part.values = rows.reshape(-1)
    finite = np.isfinite(rows)
    if not finite.all():
        index = np.argwhere(~finite)[0]
        part.nonfinite = int(rows.size - np.count_nonzero(finite))
        part.first_nonfinite = (int(index[1]),) if vector else (first + int(index[0]), int(index[1]))
        rows = np.where(finite, rows, 0)
    low, high = rows.min(axis=1), rows.max(axis=1)
    part.minimum, part.maximum = float(low.min()), float(high.max())
    part.zeros = int(rows.size - np.count_nonzero(rows))
    wide = rows.astype(np.float64) if part.largest > LARGEST_SQUARED else rows
    part.row_squares = np.einsum("ij,ij->i", wide, wide).astype(np.float64)
    part.total_square = float(part.row_squares.sum())
    if vector:
        return part
    part.column_squares = np.einsum("ij,ij->j", wide, wide).astype(np.float64)
    part.row_hashes = np.fromiter((hash(row.tobytes()) for row in rows), np.int64, len(rows)).view(np.uint64)
    zero = (low == 0) & (high == 0)
    part.zero_rows = int(np.count_nonzero(zero))
    part.constant_rows = int(np.count_nonzero((low == high) & ~zero)) if rows.shape[1] > 1 else 0
    part.hole = _hole(rows, zero, first) if part.zeros >= ZERO_RUN else None
    _count_blocks(part, tensor, rows, zero)
    return part


def _hole(rows: Array, zero: NDArray[np.bool_], first: int) -> int | None:
    """The first row that is not zero itself and has ``ZERO_RUN`` zeros in a row."""
    for index in np.flatnonzero((np.count_nonzero(rows, axis=1) <= rows.shape[1] - ZERO_RUN) & ~zero):
        places = np.concatenate([[-1], np.flatnonzero(rows[index]), [rows.shape[1]]])
        if (np.diff(places) > ZERO_RUN).any():
            return first + int(index)
    return None


def _count_blocks(part: TensorStatistics, tensor: LazyTensor, rows: Array, zero: NDArray[np.bool_]) -> None:
    size = block_size(tensor)
    if size is None or zero.all():
        return
    largest = np.abs(rows[~zero]).reshape(-1, rows.shape[1] // size, size).max(axis=2)
    part.blocks = largest.size
    # Rows differ in magnitude, those of an embedding most: a block is held to its own row.
    rms = np.sqrt(part.row_squares[~zero] / rows.shape[1])[:, None]
    part.zero_blocks = int(np.count_nonzero(largest < NEARLY_ZERO * rms))


def _merged(parts: list[TensorStatistics]) -> TensorStatistics:
    whole = parts[0]
    for part in parts[1:]:
        if part.nonfinite and not whole.nonfinite:
            whole.first_nonfinite = part.first_nonfinite
        for name in ("nonfinite", "zeros", "total_square", "zero_rows", "constant_rows", "blocks", "zero_blocks"):
            setattr(whole, name, getattr(whole, name) + getattr(part, name))
        whole.minimum, whole.maximum = min(whole.minimum, part.minimum), max(whole.maximum, part.maximum)
        whole.hole = part.hole if whole.hole is None else whole.hole
        if whole.values is None:
            whole.column_squares = whole.column_squares + part.column_squares
    if len(parts) > 1:
        whole.row_squares = np.concatenate([part.row_squares for part in parts])
        whole.row_hashes = np.concatenate([part.row_hashes for part in parts])
        if whole.values is not None:
            whole.values = np.concatenate([part.values for part in parts if part.values is not None])
    return whole
