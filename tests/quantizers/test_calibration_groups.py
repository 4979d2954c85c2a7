"""Types whose groups or rows have scales, under error feedback: smaller errors than the type's own rule gives, no step
that raises them, rows that do not depend on each other.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gemma2tool.quantizers.awq import Awq
from gemma2tool.quantizers.base import Encoder
from gemma2tool.quantizers.bnb import FourBit, Int8, NestedScales
from gemma2tool.quantizers.calibration import group_rounding
from gemma2tool.quantizers.calibration.grid import grid_of
from gemma2tool.quantizers.calibration.group_descent import descend
from gemma2tool.quantizers.calibration.group_layouts import GroupCodes, GroupLayout, group_layout
from gemma2tool.quantizers.calibration.group_rounding import round_groups
from gemma2tool.quantizers.calibration.rounding import group_of_column
from gemma2tool.quantizers.compressed import Compressed
from gemma2tool.quantizers.compressed_floats import CompressedFloats
from gemma2tool.quantizers.gptq import Gptq
from gemma2tool.quantizers.mlx import Affine, Floats
from gemma2tool.quantizers.torchao import Float8, Int4, Int8WeightOnly, UnpackedInt4
from tests.support.calibration import COLUMNS, ROWS, factors_of

pytestmark = pytest.mark.usefixtures("one_thread")

ENCODERS: dict[str, Encoder] = {
    "nf4": FourBit("nf4"),
    "fp4": FourBit("fp4"),
    "int8": Int8(),
    "mlx-4": Affine(4),
    "mlx-mxfp8": Floats("mxfp8"),
    "nvfp4a16": CompressedFloats("nvfp4a16", absmax=4.0),
    "mlx-2": Affine(2, group_size=32),
    "gptq-4": Gptq(4),
    "gptq-4 with zeros": Gptq(4, symmetric=False),
    "gptq-4 whole rows": Gptq(4, -1),
    "awq-4": Awq(128),
    "w4a16-asym": Compressed("w4a16-asym"),
    "w8a16": Compressed("w8a16"),
    "fp8-dynamic": Compressed("fp8-dynamic"),
    "fp8-block": Compressed("fp8-block"),
    "torchao-int8": Int8WeightOnly(),
    "torchao-fp8": Float8(),
    "torchao-int4": Int4(),
    "torchao-int8-int4": UnpackedInt4(),
}


def errors(x: np.ndarray, rows: np.ndarray, values: np.ndarray, block: int | None = None) -> np.ndarray:
    """The squared error of each row's outputs, with the damping, (n,)."""
    total, step = np.zeros(len(rows)), block or COLUMNS
    for first in range(0, COLUMNS, step):
        part = slice(first, first + step)
        error, hessian = (values - rows)[:, part].astype(np.float64), x[:, part].T.astype(np.float64) @ x[:, part]
        hessian[np.diag_indices(len(hessian))] += 0.01 * np.diag(hessian).mean()
        total += ((error @ hessian) * error).sum(1)
    return total


def nearest(layout: GroupLayout, rows: np.ndarray) -> GroupCodes:
    """Rounded by the type's own rule, each code to the nearest level."""
    scales, offsets = layout.start(*layout.ranges(rows))
    groups = np.arange(COLUMNS) // layout.width
    levels = rows
    if offsets is not None and layout.zeros is None:
        levels = levels - offsets[:, groups]
    levels = levels / scales[:, groups]
    if offsets is not None and layout.zeros is not None:
        levels = levels - offsets[:, groups]
    codes = np.searchsorted((layout.levels[1:] + layout.levels[:-1]) / 2, levels).astype(np.uint8)
    return GroupCodes(codes, layout.round_scales(scales), offsets)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_errors_are_far_smaller_than_by_the_types_own_rule(name: str, inputs: np.ndarray, rows: np.ndarray) -> None:
    grid, factors = grid_of(ENCODERS[name], COLUMNS), factors_of(inputs)
    groups = group_of_column(factors, COLUMNS, grid.group_size)
    chosen = grid.values(grid.round_rows(rows, factors), groups)
    own = grid.layout.values(nearest(grid.layout, rows), groups)
    assert errors(inputs, rows, chosen).sum() < 0.55 * errors(inputs, rows, own).sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nf4", "mlx-4", "awq-4", "gptq-4 whole rows", "fp8-block"])
@pytest.mark.parametrize(("block", "act_order"), [(None, False), (128, False), (None, True)])
def test_descent_never_raises_the_error_of_a_row(
    name: str, block: int | None, act_order: bool, inputs: np.ndarray, rows: np.ndarray
) -> None:
    factors = factors_of(inputs, block, act_order=act_order)
    layout = replace(group_layout(ENCODERS[name], COLUMNS), dtype=np.dtype(np.float32))
    groups = group_of_column(factors, COLUMNS, layout.width)
    result = (
        group_rounding._round_by_group(rows, factors, layout)
        if group_rounding.has_own_scales(layout, factors)
        else group_rounding._round_with_fixed_scales(rows, factors, layout)
    )
    before = errors(inputs, rows, layout.values(result, groups), block)
    descend(rows, result, factors, layout, 1)
    after = errors(inputs, rows, layout.values(result, groups), block)
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < before.sum()


def test_fitting_never_raises_the_error_of_a_row(inputs: np.ndarray, rows: np.ndarray, monkeypatch) -> None:
    """Nor does trying more scales: the error that counts is the group's own."""
    upper, layout = factors_of(inputs)[0].row_major[:64, :64], group_layout(Affine(4), COLUMNS)
    fitted = group_rounding._round_group(rows[:, :64], upper, layout)
    monkeypatch.setattr(group_rounding, "FITS", 0)
    tried = group_rounding._round_group(rows[:, :64], upper, layout)
    monkeypatch.setattr(group_rounding, "FACTORS", (1.0,))
    monkeypatch.setattr(group_rounding, "SHIFTS", (0.0,))
    own = group_rounding._round_group(rows[:, :64], upper, layout)
    assert (fitted.losses <= tried.losses).all()
    assert (tried.losses <= own.losses).all()
    assert fitted.losses.sum() < 0.97 * tried.losses.sum() < 0.9 * own.losses.sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nf4", "mlx-4", "awq-4", "int8"])
def test_rows_are_independent(name: str, inputs: np.ndarray, rows: np.ndarray) -> None:
    layout, factors = group_layout(ENCODERS[name], COLUMNS), factors_of(inputs)
    together, alone = round_groups(rows, factors, layout), round_groups(rows[8:16], factors, layout)
    assert (together.codes[8:16] != alone.codes).mean() < 0.01  # products of other shapes differ in their last bits


@pytest.mark.slow
def test_a_scale_of_a_row_knows_all_blocks_of_the_hessian(inputs: np.ndarray, rows: np.ndarray) -> None:
    layout = group_layout(Gptq(4, -1), COLUMNS)
    result = round_groups(rows, factors_of(inputs, 64), layout)
    assert result.scales.shape == (ROWS, 1)
    own = nearest(layout, rows)
    groups = np.zeros(COLUMNS, np.int32)
    wanted = errors(inputs, rows, layout.values(own, groups), 64).sum()
    assert errors(inputs, rows, layout.values(result, groups), 64).sum() < 0.6 * wanted


@pytest.mark.slow
def test_scales_that_are_quantized_themselves(inputs: np.ndarray, rows: np.ndarray) -> None:
    """The scales are those that the library dequantizes to, and the codes were chosen for them."""
    layout, factors = group_layout(FourBit("nf4", True, nested_offset=0.12), COLUMNS), factors_of(inputs)
    result = round_groups(rows, factors, layout)
    assert result.nested is not None
    assert np.array_equal(result.scales, NestedScales(result.nested.codes, result.nested.absmax).values(0.12))
    plain = round_groups(rows, factors, replace(layout, nested_offset=None))
    groups = np.arange(COLUMNS) // 64
    cost, least = (errors(inputs, rows, layout.values(outcome, groups)).sum() for outcome in (result, plain))
    assert cost < 1.1 * least


def test_rows_of_no_whole_blocks_are_left_to_rounding_to_nearest() -> None:
    assert group_layout(FourBit("nf4"), 96) is None
    assert group_layout(FourBit("nf4"), 128) is not None


@pytest.mark.slow
def test_a_group_of_zeros_stays_zero(inputs: np.ndarray, rows: np.ndarray) -> None:
    rows = rows.copy()
    rows[:, 128:256] = 0
    quiet = inputs.copy()
    quiet[:, 128:256] = 0
    for name in ("nf4", "mlx-4", "awq-4"):
        layout = group_layout(ENCODERS[name], COLUMNS)
        result = round_groups(rows, factors_of(quiet), layout)
        values = layout.values(result, np.arange(COLUMNS) // layout.width)
        assert np.abs(values[:, 128:256]).max() < 1e-6
        assert np.isfinite(values).all()
