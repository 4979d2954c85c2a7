"""GGUF's block types under error feedback: blocks put together as ggml takes them apart, errors that are what they say,
smaller than those of an importance matrix, the same on every instruction set.
"""

from __future__ import annotations

import numpy as np
import pytest

from gemma2tool.quantizers.calibration import block_rounding, vector_rounding
from gemma2tool.quantizers.calibration.block_layouts import LAYOUTS, f16, scales_and_offsets
from gemma2tool.quantizers.calibration.block_rounding import round_block, round_blocks
from gemma2tool.quantizers.calibration.vector_layouts import VECTOR_LAYOUTS, VectorFields, entries_of
from gemma2tool.quantizers.gguf_types import GGUF_TYPES, dequantize, quantize
from gemma2tool.quantizers.kernels import _native
from tests.support.calibration import COLUMNS, factors_of

pytestmark = pytest.mark.usefixtures("one_thread")

IQ1 = ("IQ1_S", "IQ1_M")
LARGEST_RATIO = {"MXFP4": 0.85, "Q1_0": 0.8, "IQ1_S": 0.9, "IQ1_M": 0.9, "IQ2_XS": 0.75, "IQ2_S": 0.75}
"""Error beside that of the type's own search with an importance matrix; 0.7 for the other types."""


def output_error(x: np.ndarray, difference: np.ndarray) -> float:
    """The squared error of the outputs, summed over inputs and rows."""
    return float(np.square(x.astype(np.float64) @ difference.T.astype(np.float64)).sum())


def random_blocks(type: str, count: int = 12) -> np.ndarray:
    columns = GGUF_TYPES[type].block_elements
    values = np.random.default_rng(2).standard_normal((count, columns)).astype(np.float32)
    return quantize(type, values, np.ones(columns, np.float32))


@pytest.mark.parametrize("type", LAYOUTS)
def test_scalar_blocks_are_put_together_as_ggml_takes_them_apart(type: str) -> None:
    layout, blocks = LAYOUTS[type], random_blocks(type)
    fields = layout.read(blocks)
    codes = np.random.default_rng(3).integers(0, len(layout.levels), (len(blocks), layout.columns)).astype(np.uint8)
    written = np.zeros_like(blocks)
    layout.write(written, codes, fields)
    scales, offsets = scales_and_offsets(layout, fields)
    values = np.array(layout.levels, np.float32)[codes].reshape(len(blocks), layout.groups, layout.width)
    values = scales[:, :, None] * values + (0 if offsets is None else offsets[:, :, None])
    assert np.array_equal(dequantize(type, written, layout.columns), values.reshape(codes.shape))
    assert np.array_equal(layout.read(written).scales, fields.scales)


@pytest.mark.slow
@pytest.mark.parametrize("type", VECTOR_LAYOUTS)
def test_vector_blocks_are_put_together_as_ggml_takes_them_apart(type: str) -> None:
    layout, blocks, generator = VECTOR_LAYOUTS[type], random_blocks(type), np.random.default_rng(3)
    entries, count = entries_of(type), len(blocks)
    codes = generator.integers(0, len(entries), (count, 256 // layout.size)).astype(np.uint16)
    negative = generator.integers(0, 2, (count, 32, 8)).astype(np.uint8)
    if layout.even_signs:
        negative[:, :, 7] = negative[:, :, :7].sum(2) & 1
    signs = np.packbits(negative, axis=2, bitorder="little")[:, :, 0]
    written = np.zeros_like(blocks)
    super_scale, scales = f16(blocks, 0), layout.read_scales(blocks)
    layout.write(written, VectorFields(super_scale, scales, codes, signs))
    values = np.repeat(layout.scales(super_scale, scales), layout.width, 1) * entries[codes].reshape(count, 256)
    values *= 1 - 2 * negative.reshape(count, 256).astype(np.float32)
    assert np.array_equal(dequantize(type, written, 256), values)
    assert np.array_equal(layout.read_scales(written), scales)


@pytest.mark.slow
@pytest.mark.parametrize("type", ["Q4_0", "Q4_K", "Q6_K", "IQ4_XS", "IQ2_S", "IQ3_XXS", "IQ1_S"])
def test_errors_are_those_of_the_outputs(type: str, inputs: np.ndarray, rows: np.ndarray) -> None:
    """The sums of squares that choices are made by are the errors of the outputs, were no columns to follow."""
    columns = GGUF_TYPES[type].block_elements
    x, w = inputs[:, :columns], rows[:, :columns].copy()
    (factor,) = factors_of(x)
    rounded = round_block(type, w, factor.upper.contiguous())
    hessian = np.linalg.inv((factor.upper.T @ factor.upper).double().numpy())
    lost = (w - dequantize(type, rounded.blocks, columns)).astype(np.float64)
    assert np.allclose(rounded.losses, ((lost @ hessian) * lost).sum(1), rtol=1e-3)
    assert np.allclose(rounded.errors.astype(np.float64) @ factor.upper.double().numpy(), lost, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("type", [*LAYOUTS, *VECTOR_LAYOUTS, *IQ1])
def test_outputs_are_nearer_than_with_an_importance_matrix(type: str, inputs: np.ndarray, rows: np.ndarray) -> None:
    importance = np.square(inputs).sum(0)
    searched = dequantize(type, quantize(type, rows, importance), COLUMNS)
    calibrated = dequantize(type, round_blocks(type, rows, factors_of(inputs)), COLUMNS)
    ratio = output_error(inputs, calibrated - rows) / output_error(inputs, searched - rows)
    assert ratio < LARGEST_RATIO.get(type, 0.7)


@pytest.mark.parametrize("type", ["Q4_0", "Q4_1", "Q2_K", "Q4_K", "IQ4_XS", "IQ2_XS", "IQ3_S"])
def test_trying_more_scales_is_never_worse_block_by_block(
    type: str, inputs: np.ndarray, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = GGUF_TYPES[type].block_elements
    (factor,) = factors_of(inputs[:, :columns])
    upper = factor.upper.contiguous()
    tried = round_block(type, rows[:, :columns], upper).losses
    for name in ("SUPER_FACTORS", "VECTOR_FACTORS"):
        monkeypatch.setattr(block_rounding, name, ())
    first = round_block(type, rows[:, :columns], upper).losses
    monkeypatch.setattr(vector_rounding, "STEPS", (0,))
    for name, value in (("STEPS", (0,)), ("SCALE_FACTORS", (1.0,)), ("MINIMUM_SHIFTS", (0.0,))):
        monkeypatch.setattr(block_rounding, name, value)
    searched = round_block(type, rows[:, :columns], upper).losses
    assert (tried <= first).all()
    assert first.sum() <= searched.sum()


@pytest.mark.parametrize("type", ["Q4_K", "Q6_K", "IQ4_NL", "IQ2_XXS", "IQ3_S"])
def test_every_instruction_set_gives_the_same_blocks(type: str, inputs: np.ndarray, rows: np.ndarray) -> None:
    columns, chosen = GGUF_TYPES[type].block_elements, _native.current_instruction_set()
    (factor,) = factors_of(inputs[:, :columns])
    results = []
    try:
        for name in _native.available_instruction_sets():
            _native.use_instruction_set(name)
            results.append(round_block(type, rows[:, :columns], factor.upper.contiguous()))
    finally:
        _native.use_instruction_set(chosen)
    assert all(np.array_equal(result.blocks, results[0].blocks) for result in results)
    assert all(np.array_equal(result.errors, results[0].errors) for result in results)


def test_blocks_of_the_hessian_are_independent(inputs: np.ndarray, rows: np.ndarray) -> None:
    whole = round_blocks("Q4_K", rows, factors_of(inputs, 256))
    halves = [
        round_blocks("Q4_K", rows[:, part], factors_of(inputs[:, part])) for part in (slice(256), slice(256, 512))
    ]
    assert np.array_equal(whole, np.concatenate(halves, axis=1))


def test_the_rows_that_are_given_stay_as_they_are(inputs: np.ndarray, rows: np.ndarray) -> None:
    before = rows.copy()
    round_blocks("Q4_0", rows, factors_of(inputs))
    assert np.array_equal(rows, before)


@pytest.mark.slow
def test_columns_without_input_and_rows_of_zeros_are_rounded(inputs: np.ndarray, rows: np.ndarray) -> None:
    x, w = inputs.copy(), rows.copy()
    x[:, 32:64], w[3] = 0, 0
    for type in ("Q4_K", "Q6_K", "IQ4_XS", "Q4_0", "IQ2_XS"):
        values = dequantize(type, round_blocks(type, w, factors_of(x)), COLUMNS)
        assert np.isfinite(values).all()
        assert np.abs(values[3]).max() < 1e-6
