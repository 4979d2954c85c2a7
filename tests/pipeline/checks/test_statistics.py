"""One pass with bounded memory, and numbers that are right."""

from __future__ import annotations

import numpy as np
import pytest

from gemma2tool.model.lazy import Array, ArrayTensor
from gemma2tool.pipeline.checks.statistics import CHUNK_BYTES, TensorStatistics, measure_tensors


class Watched(ArrayTensor):
    """Counts how often each row is read, and the largest range."""

    def __init__(self, array: Array) -> None:
        super().__init__(array)
        self.reads = np.zeros(self.rows, int)
        self.largest = 0

    def load_rows(self, first: int, last: int) -> Array:
        self.reads[first:last] += 1
        self.largest = max(self.largest, (last - first) * self.row_size * 4)
        return super().load_rows(first, last)


def measured(array: Array) -> TensorStatistics:
    ((_, statistics),) = measure_tensors({"x": ArrayTensor(array)})
    return statistics


@pytest.mark.parametrize("threads", [1, 3])
def test_every_row_is_read_once_in_small_ranges(threads: int) -> None:
    tensors = {str(n): Watched(np.ones((n, 1024), np.float32)) for n in (1, 3000, 5000)}
    assert [name for name, _ in measure_tensors(tensors, threads=threads)] == list(tensors)
    assert all((tensor.reads == 1).all() and tensor.largest <= CHUNK_BYTES for tensor in tensors.values())


@pytest.mark.parametrize("rows", [7, 4000])
def test_numbers(rows: int) -> None:
    array = np.random.default_rng(0).standard_normal((rows, 640)).astype(np.float32)
    array[2], array[3] = 0, 0.5
    array[5] = array[4]
    statistics = measured(array)
    assert (statistics.zero_rows, statistics.constant_rows, statistics.zeros) == (1, 1, 640)
    assert statistics.minimum == array.min() and statistics.maximum == array.max()
    squares = np.square(array, dtype=np.float64)
    np.testing.assert_allclose(statistics.row_squares, squares.sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(statistics.column_squares, squares.sum(axis=0), rtol=1e-5)
    assert statistics.row_hashes[4] == statistics.row_hashes[5]
    assert len(np.unique(statistics.row_hashes)) == rows - 1


def test_nonfinite_values_are_counted_and_left_out() -> None:
    array = np.full((3000, 1024), 1e30, np.float32)
    array[2999, 5] = np.nan
    array[10, 7] = -np.inf
    statistics = measured(array)
    assert statistics.nonfinite == 2 and statistics.first_nonfinite == (10, 7)
    assert np.isfinite(statistics.rms) and statistics.rms == pytest.approx(1e30, rel=1e-3)


def test_a_hole_is_a_run_of_zeros_within_a_row() -> None:
    array = np.ones((4, 2048), np.float32)
    array[2, 100:611] = 0
    assert measured(array).hole is None
    array[2, 100:612] = 0
    assert measured(array).hole == 2
