"""GPTQ against the equations of the paper, AWQ's searches against the output errors they minimize; any number of
threads."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from gemma2tool.model.lazy import BFLOAT16, FLOAT32, to_float32
from gemma2tool.pipeline.calibration.methods import folded_norm
from gemma2tool.quantizers import awq, gptq
from gemma2tool.quantizers.awq import Awq
from gemma2tool.quantizers.calibration import clipping, rounding, scales
from gemma2tool.quantizers.calibration.grid import RoundedMatrix, grid_of, quantize_to_nearest
from gemma2tool.quantizers.calibration.hessian import Factor, Hessian, inverse_factor, inverse_factors, invert_lower_
from gemma2tool.quantizers.gptq import Gptq
from tests.support.calibration import correlated_inputs, dequantized, textbook_gptq

COLUMNS, ROWS, TOKENS = 256, 48, 1500


pytestmark = pytest.mark.usefixtures("one_thread")


def hessian_of(x: np.ndarray, block: int | None = None, dtype: torch.dtype = torch.float64) -> Hessian:
    hessian = Hessian(x.shape[1], block, dtype=dtype)
    for part in np.array_split(x, 3):
        hessian.add(torch.from_numpy(part).to(dtype))
    return hessian


def weights(seed: int = 1, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * 0.05).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_those_of_the_paper(bits: int, group_size: int, symmetric: bool, act_order: bool) -> None:
    x, w = correlated_inputs(TOKENS, COLUMNS), weights()
    grid = grid_of(Gptq(bits, group_size, symmetric), COLUMNS, textbook=True)
    factors = inverse_factors(hessian_of(x), 0.01, act_order)
    codes, zeros, scales = rounding.round_rows(w, factors, grid)
    groups = rounding.group_of_column(factors, COLUMNS, grid.group_size)
    expected = textbook_gptq(w, x.T @ x, grid, 0.01, act_order)
    assert np.array_equal(codes, expected[0])
    assert np.array_equal(zeros, expected[1])
    assert np.array_equal(scales, expected[2])
    assert np.array_equal(groups, expected[3])


@pytest.mark.slow
def test_float32_finds_nearly_the_same_codes_and_as_small_an_error() -> None:
    x, w = correlated_inputs(TOKENS, COLUMNS), weights()
    grid = grid_of(Gptq(4, 32), COLUMNS, textbook=True)
    expected = textbook_gptq(w, x.T @ x, grid, 0.01, False)
    codes, zeros, scales = rounding.round_rows(
        w, inverse_factors(hessian_of(x, dtype=torch.float32), 0.01, False), grid
    )
    assert (codes != expected[0]).mean() < 0.002
    error, expected_error = (
        np.linalg.norm(x @ (w - dequantized(*quantized, expected[3])).T)
        for quantized in ((codes, zeros, scales), expected[:3])
    )
    assert error == pytest.approx(expected_error, rel=1e-3)


def test_output_error_is_smaller_than_with_rounding_to_nearest() -> None:
    x, w = correlated_inputs(TOKENS, COLUMNS), weights()
    grid, groups = grid_of(Gptq(4, 32), COLUMNS, textbook=True), np.arange(COLUMNS) // 32
    output_error = [
        np.linalg.norm(x @ (w - dequantized(*quantized, groups)).T)
        for quantized in (
            rounding.round_rows(w, inverse_factors(hessian_of(x), 0.01, False), grid),
            gptq.quantize(w, 4, 32, True),
        )
    ]
    assert output_error[0] < 0.85 * output_error[1]


@pytest.mark.parametrize("act_order", [False, True])
def test_blocks_of_the_hessian_are_independent(act_order: bool) -> None:
    x, w = correlated_inputs(TOKENS, COLUMNS), weights()
    grid = grid_of(Gptq(4, 32, False), COLUMNS, textbook=True)
    factors = inverse_factors(hessian_of(x, 96), 0.02, act_order)
    assert [len(factor.upper) for factor in factors] == [96, 96, 64]
    codes, zeros, scales = rounding.round_rows(w, factors, grid)
    groups = rounding.group_of_column(factors, COLUMNS, grid.group_size)
    for first, last in ((0, 96), (96, 192), (192, 256)):
        part = x[:, first:last]
        expected = textbook_gptq(w[:, first:last], part.T @ part, grid, 0.02, act_order)
        assert np.array_equal(codes[:, first:last], expected[0])
        assert np.array_equal(zeros[:, first // 32 : last // 32], expected[1])
        assert np.array_equal(scales[:, first // 32 : last // 32], expected[2])
        assert np.array_equal(groups[first:last], expected[3] + first // 32)


def test_columns_that_no_input_reaches_are_rounded_to_nearest() -> None:
    x, w = correlated_inputs(TOKENS, COLUMNS), weights()
    x[:, 32:64] = 0
    grid = grid_of(Gptq(4, 32), COLUMNS, textbook=True)
    codes, _, scales = rounding.round_rows(w, inverse_factors(hessian_of(x), 0.01, False), grid)
    nearest, _, nearest_steps = gptq.quantize(w, 4, 32, True)
    assert np.array_equal(codes[:, 32:64], nearest[:, 32:64])
    assert np.array_equal(scales[:, 1], nearest_steps[:, 1])


def test_the_factor_is_of_the_damped_inverse() -> None:
    x = correlated_inputs(TOKENS, 300)
    h = torch.from_numpy(x.T @ x)
    upper = inverse_factor(h.flip(0, 1), 0.01)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(300, dtype=h.dtype)
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(300, dtype=h.dtype), atol=1e-8)


def test_a_factor_is_copied_once_for_all_threads() -> None:
    copies: list[object] = []

    class Slow:
        def contiguous(self) -> object:
            time.sleep(0.02)
            copies.append(object())
            return copies[-1]

    factor = Factor(torch.arange(1), Slow())  # type: ignore[arg-type]
    with ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(lambda _: factor.row_major, range(8)))
    assert len(copies) == 1 and set(seen) == set(copies)


def test_more_damping_where_the_hessian_is_singular() -> None:
    x = np.ones((8, 64)) + 1e-9 * correlated_inputs(8, 64)
    upper = inverse_factor(torch.from_numpy(x.T @ x).float().flip(0, 1), 0.0 + 1e-9)
    assert torch.isfinite(upper).all()
    with pytest.raises(torch.linalg.LinAlgError):
        inverse_factor(-torch.eye(8), 0.01)


@pytest.mark.slow
def test_triangular_inverse_by_halves() -> None:
    lower = torch.from_numpy(np.tril(np.random.default_rng(0).standard_normal((700, 700))) * 0.02) + torch.eye(700)
    inverse = lower.clone()
    invert_lower_(inverse)
    assert torch.allclose(inverse @ lower, torch.eye(700, dtype=lower.dtype), atol=1e-10)
    assert torch.equal(inverse, inverse.tril())


def test_hessian_is_the_sum_of_products_and_magnitudes() -> None:
    x = correlated_inputs(400, 700)
    hessian = hessian_of(x)
    hessian.symmetrize()
    assert torch.allclose(hessian.squares[0], torch.from_numpy(x.T @ x), rtol=1e-12)
    assert torch.equal(hessian.squares[0], hessian.squares[0].T)
    assert np.allclose(hessian.mean_magnitude.numpy(), np.abs(x).mean(0), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    x = torch.from_numpy(correlated_inputs(300, 1100)).float()
    w = weights(rows=40, columns=1100 // 32 * 32)
    one, several = Hessian(1100), Hessian(1100)
    one.add(x)
    with ThreadPoolExecutor(threads) as pool:
        several.add(x, pool.map)
    assert torch.equal(one.squares[0], several.squares[0])
    small, grid = (
        hessian_of(x[:, : w.shape[1]].numpy(), dtype=torch.float32),
        grid_of(Awq(32), w.shape[1], textbook=True),
    )
    small.symmetrize()
    results = [scales.search_scales([w], small, small.mean_magnitude, grid)]
    with ThreadPoolExecutor(threads) as pool:
        results.append(scales.search_scales([w], small, small.mean_magnitude, grid, pool.map))
    assert np.array_equal(*results)


@pytest.mark.slow
@pytest.mark.parametrize("block", [None, 64])
def test_scale_search_minimizes_the_output_error(block: int | None) -> None:
    """The error that is minimized is that of the outputs themselves, for the whole Hessian, and the search finds its
    minimum."""
    x, w = correlated_inputs(TOKENS, COLUMNS), weights()
    grid, hessian = grid_of(Awq(32), COLUMNS, textbook=True), hessian_of(x, block, torch.float32)
    hessian.symmetrize()
    magnitude = torch.from_numpy(np.abs(x).mean(0))

    def output_error(s: np.ndarray) -> float:
        codes, zeros, steps = awq.quantize(w * s, 32)
        error = awq.dequantize(codes, zeros, steps, 32) / s - w
        parts = [slice(None)] if block is None else [slice(first, first + block) for first in range(0, COLUMNS, block)]
        return sum(float(((x[:, part] @ error[:, part].T) ** 2).sum()) for part in parts)

    candidates = [scales.scales_of_power(magnitude, power) for power in scales.POWERS]
    assert np.array_equal(candidates[0], np.ones(COLUMNS, np.float32))
    for s in candidates[::6]:
        assert scales.output_error(w, s, hessian, grid) == pytest.approx(output_error(s), rel=1e-3)
    best = scales.search_scales([w], hessian, magnitude, grid)
    assert output_error(best) == pytest.approx(min(map(output_error, candidates)), rel=1e-3)
    assert output_error(best) < 0.9 * output_error(candidates[0])


@pytest.mark.slow
@pytest.mark.parametrize("width", [32, 128, COLUMNS])
@pytest.mark.parametrize("block", [None, 128])
def test_clipping_never_increases_the_error_of_a_group(width: int, block: int | None) -> None:
    x, w = correlated_inputs(TOKENS, COLUMNS), weights()
    w[np.random.default_rng(2).random(w.shape) < 0.01] *= 5
    grid, hessian = (
        grid_of(Awq(width if width < COLUMNS else -1), COLUMNS, textbook=True),
        hessian_of(x, block, torch.float32),
    )
    hessian.symmetrize()
    s = scales.scales_of_power(hessian.mean_magnitude, 0.3)
    clipped = clipping.quantize_clipped(w * s, grid, clipping.hessian_blocks(hessian, grid.group_size, s))
    nearest = quantize_to_nearest(w * s, grid)
    groups = np.arange(COLUMNS) // grid.group_size

    def output_error(quantized: tuple[np.ndarray, ...]) -> np.ndarray:
        """The output error of each group of each row, (rows, groups)."""
        error = dequantized(*quantized, groups) / s - w
        spans = range(0, COLUMNS, min(width, block or COLUMNS))
        step = min(width, block or COLUMNS)
        cost = np.zeros((ROWS, COLUMNS // width))
        for first in spans:
            cost[:, first // width] += ((x[:, first : first + step] @ error[:, first : first + step].T) ** 2).sum(0)
        return cost

    assert (output_error(clipped) <= output_error(nearest) * (1 + 1e-3)).all()
    assert output_error(clipped).sum() < 0.9 * output_error(nearest).sum()
    assert (clipped[2] < nearest[2]).any()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_a_folded_norm_and_its_columns_compute_the_same(dtype: np.dtype) -> None:
    generator = np.random.default_rng(0)
    w = to_float32(generator.standard_normal(500).astype(dtype))
    w[:3] = -1, -2.5, -1 + 2**-9
    requested = np.exp(generator.standard_normal(500)).astype(np.float32)
    stored, actual = folded_norm(w, requested, dtype)
    assert stored.dtype == dtype
    assert np.isfinite(actual).all()
    assert (actual > 0).all()
    assert np.allclose((1 + to_float32(stored)) * actual, 1 + w, rtol=1e-6, atol=1e-7)
    assert np.median(np.abs(actual / requested - 1)) < 0.01


def test_records_hold_codes_zeros_and_scales() -> None:
    w, grid = weights(), grid_of(Gptq(4, 64, False), COLUMNS, textbook=True)
    codes, zeros, scales = gptq.quantize(w, 4, 64, False)
    matrix = RoundedMatrix(grid, grid.records(codes, zeros, scales), np.arange(COLUMNS) // 64, "w")
    rows = matrix.records[5:9]
    assert matrix.shape == w.shape
    assert np.array_equal(rows["codes"], codes[5:9])
    expected = (rows["codes"].astype(np.float32) - np.repeat(rows["zeros"], 64, 1)) * np.repeat(
        to_float32(rows["scales"]), 64, 1
    )
    assert np.array_equal(matrix.load_rows(5, 9), expected)
