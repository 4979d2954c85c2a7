"""Error feedback between rows: equal to error feedback over the whole matrix with the Kronecker product as Hessian."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from gemma2tool.quantizers import gptq
from gemma2tool.quantizers.calibration import row_feedback
from gemma2tool.quantizers.calibration.grid import AffineGrid
from gemma2tool.quantizers.calibration.hessian import Factor, Hessian, inverse_factors
from gemma2tool.quantizers.calibration.rounding import group_of_column
from tests.support.calibration import correlated_inputs, textbook_gptq

ROWS, COLUMNS = 24, 32
GRID = AffineGrid(15, 16, functools.partial(gptq.grid, bits=4, symmetric=False))
GROUPS = np.arange(COLUMNS, dtype=np.int32) // 16


def hessian_of(samples: np.ndarray, block: int | None = None) -> Hessian:
    hessian = Hessian(samples.shape[1], block, dtype=torch.float64)
    hessian.add(torch.from_numpy(samples))
    return hessian


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((ROWS, COLUMNS)).astype(np.float32)


def factors(block: int | None = None, *, act_order: bool = True) -> tuple[list[Factor], list[Factor]]:
    """Of inputs and outputs that are correlated."""
    inputs = inverse_factors(hessian_of(correlated_inputs(400, COLUMNS, 2)), 0.01, act_order=False)
    outputs = inverse_factors(hessian_of(correlated_inputs(400, ROWS, 3), block), 0.01, act_order)
    return inputs, [Factor(factor.columns, factor.upper.float()) for factor in outputs]


def damped(samples: np.ndarray) -> np.ndarray:
    hessian = samples.T @ samples
    hessian[np.diag_indices(len(hessian))] += 0.01 * np.diag(hessian).mean()
    return hessian


def rounded(weight: np.ndarray, inputs: list[Factor], outputs: list[Factor]) -> np.ndarray:
    return row_feedback.round_matrix(lambda first, last: weight[first:last], GRID, GROUPS, inputs, outputs)


@pytest.mark.slow
def test_the_textbook_over_the_whole_matrix(weight: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQ of all values as one row, whose Hessian is the Kronecker product of both sides."""
    monkeypatch.setattr(row_feedback, "STEPS", ROWS)
    inputs, outputs = factors(act_order=False)
    assert np.array_equal(group_of_column(inputs, COLUMNS, 16), GROUPS)
    whole = np.kron(damped(correlated_inputs(400, ROWS, 3)), damped(correlated_inputs(400, COLUMNS, 2)))
    codes = textbook_gptq(weight.reshape(1, -1), whole, GRID, 0.0, act_order=False)[0]
    assert np.array_equal(rounded(weight, inputs, outputs)["codes"], codes.reshape(weight.shape))


@pytest.mark.parametrize("block", [None, 8])
def test_a_smaller_loss(weight: np.ndarray, block: int | None) -> None:
    inputs, outputs = factors(block)
    of_outputs, of_inputs = damped(correlated_inputs(400, ROWS, 3)), damped(correlated_inputs(400, COLUMNS, 2))
    if block:
        of_outputs *= np.arange(ROWS)[:, None] // block == np.arange(ROWS) // block

    def loss(records: np.ndarray) -> float:
        error = GRID.values(records, GROUPS).astype(np.float64) - weight
        return float(np.sum((of_outputs @ error @ of_inputs) * error))

    assert loss(rounded(weight, inputs, outputs)) < 0.8 * loss(GRID.round_rows(weight, inputs))


def test_independent_outputs_change_nothing(weight: np.ndarray) -> None:
    inputs, _ = factors()
    outputs = [Factor(torch.arange(ROWS).flip(0), torch.eye(ROWS))]
    assert np.array_equal(rounded(weight, inputs, outputs), GRID.round_rows(weight, inputs))
