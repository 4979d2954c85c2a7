"""The errors of blocks and their sums, beside numpy's, for every instruction set, dtype and block size."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.quantizers import kernels
from gemma2tool.quantizers.comparison import ErrorSums, compare_blocks, count_differing, sum_errors

BF16 = np.dtype(ml_dtypes.bfloat16)
FLOAT_MAX = np.finfo(np.float32).max
DTYPES = [np.dtype(np.float32), BF16, np.dtype(np.float16), np.dtype(np.float64)]


@pytest.fixture(params=kernels.available_instruction_sets())
def instruction_set(request):
    before = kernels.current_instruction_set()
    kernels.use_instruction_set(request.param)
    yield request.param
    kernels.use_instruction_set(before)


def finite_pairs(source: np.ndarray, actual: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both sides in float32 with zeros where one of them is not finite, and their errors."""
    source, actual = source.astype(np.float32), actual.astype(np.float32)
    keep = np.isfinite(source) & np.isfinite(actual)
    source, actual = np.where(keep, source, np.float32(0)), np.where(keep, actual, np.float32(0))
    with np.errstate(over="ignore"):
        return source, actual, np.clip(actual - source, -FLOAT_MAX, FLOAT_MAX)


def reference_blocks(
    source: np.ndarray, actual: np.ndarray, block: int
) -> tuple[list[float], list[float], list[float]]:
    source, _, errors = finite_pairs(source, actual)
    absmax, worst, anchor = [], [], []
    for first in range(0, source.size, block):
        magnitudes, of_block = np.abs(source[first : first + block]), np.abs(errors[first : first + block])
        absmax.append(magnitudes.max())
        worst.append(of_block.max())
        anchor.append(of_block[magnitudes.argmax()])
    return absmax, worst, anchor


def values(kind: str, size: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    source = generator.standard_normal(size).astype(dtype)
    actual = (source.astype(np.float32) + 0.1 * generator.standard_normal(size)).astype(np.float32)
    if kind == "few":
        source, actual = np.round(2 * source.astype(np.float32)).astype(dtype), np.round(actual)
    elif kind == "not finite":
        source[generator.integers(size, size=9)] = np.inf
        actual[generator.integers(size, size=9)] = np.nan
        actual[:2] = -np.inf
    elif kind == "enormous":
        source, actual = (source * 3e37).astype(dtype), (actual * -3e37).astype(np.float32)
    return source, actual


@pytest.mark.parametrize("kind", ["normal", "few", "not finite", "enormous"])
@pytest.mark.parametrize("block", [1, 16, 32, 64, 100, 256, 5000])
def test_blocks_and_sums_are_numpys(kind: str, block: int, instruction_set: str) -> None:
    for dtype in DTYPES if kind != "enormous" else DTYPES[:2]:
        source, actual = values(kind, 2311, dtype)
        sums, blocks = compare_blocks(source, actual, block, with_anchor=True)
        expected = reference_blocks(source, actual, block)
        for of_blocks, of_numpy in zip((blocks.absmax, blocks.worst, blocks.anchor), expected, strict=True):
            assert np.array_equal(of_blocks, np.array(of_numpy, np.float32))
        assert compare_blocks(source, actual, block, with_anchor=False)[1].anchor is None
        kept, _, errors = (side.astype(np.float64) for side in finite_pairs(source, actual))
        assert np.isclose(sums.signal, (kept**2).sum(), rtol=1e-12)
        assert np.isclose(sums.noise, (errors**2).sum(), rtol=1e-12)
        assert np.isclose(sums.bias, errors.sum(), rtol=1e-9)
        assert sums.largest == np.abs(errors).max()
        nonfinite = ~np.isfinite(actual)
        assert sums.nonfinite == nonfinite.sum() and sums.source_nonfinite == (~np.isfinite(source)).sum()
        assert sums.first_nonfinite == (nonfinite.argmax() if nonfinite.any() else -1)


def test_a_narrow_candidate(instruction_set: str) -> None:
    source, actual = values("normal", 999, np.dtype(np.float32))
    for dtype in DTYPES:
        narrow = actual.astype(dtype)
        sums, blocks = compare_blocks(source, narrow, 50, with_anchor=True)
        assert (sums, *map(bytes, vars(blocks).values())) == (
            lambda result: (result[0], *map(bytes, vars(result[1]).values()))
        )(compare_blocks(source, narrow.astype(np.float32), 50, with_anchor=True))


def test_every_instruction_set_gives_the_same_sums() -> None:
    source, actual = values("not finite", 4001, BF16)
    before, results = kernels.current_instruction_set(), set()
    for name in kernels.available_instruction_sets():
        kernels.use_instruction_set(name)
        results.add(compare_blocks(source, actual, 96, with_anchor=True)[0])
    kernels.use_instruction_set(before)
    assert len(results) == 1


def test_nothing() -> None:
    empty = np.empty(0, np.float32)
    assert sum_errors(empty, empty) == ErrorSums(0, 0, 0, 0, 0, 0, -1)
    assert count_differing(empty, empty) == (0, -1)
    with pytest.raises(ValueError, match="cannot be compared"):
        sum_errors(np.zeros(2, np.float32), np.zeros(3, np.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_differing_bits(dtype: np.dtype, instruction_set: str) -> None:
    a = np.random.default_rng(0).standard_normal(100_003).astype(dtype)
    b = a.copy()
    assert count_differing(a, b) == (0, -1)
    b[[70_001, 99_999]] = 5
    assert count_differing(a, b) == (2, 70_001)
    zero, negative = np.zeros(3, dtype), -np.zeros(3, dtype)
    assert count_differing(zero, negative) == (3, 0)
    assert count_differing(a, (a + 1).astype(dtype)) == (a.size, 0)
