"""Round-to-nearest types of serving libraries, against the arithmetic of those libraries, in torch and in the weight's
dtype.

This arithmetic was compared with compressed-tensors 0.20, torchao 0.18 and mlx 0.32 ; the oracle files
that they wrote check it again in test_packings.py.
"""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import pytest
import torch

from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.quantizers import awq, bitpack, compressed, float_codes, gptq, groups, kernels, mlx, torchao
from tests.support.kernel_data import ROWS, rows
from tests.support.packings import BF16, DTYPES, bits, encoded, to_torch


@pytest.fixture(params=kernels.available_instruction_sets())
def instruction_set(request):
    before = kernels.current_instruction_set()
    kernels.use_instruction_set(request.param)
    yield request.param
    kernels.use_instruction_set(before)


@functools.cache
def every_kind(height: int = 12) -> list[np.ndarray]:
    arrays = []
    for kind in ROWS:
        for dtype in DTYPES:
            with np.errstate(over="ignore"):
                array = rows(kind, 3, height, 256).astype(dtype)
            if np.isfinite(array.astype(np.float32)).all():
                arrays.append(array)
    return arrays


def compressed_tensors(weight: torch.Tensor, scheme: compressed.Scheme):
    """compressed-tensors' calculate_qparams and quantize, each operation in the weight's dtype."""
    height, width = scheme.block_rows, scheme.group_size or weight.shape[1]
    blocks = weight.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2)
    zero = torch.zeros((), dtype=weight.dtype)
    low, high = torch.min(blocks.amin((2, 3)), zero), torch.max(blocks.amax((2, 3)), zero)
    levels = torch.tensor(scheme.high - scheme.low).to(weight.dtype)
    zero_points = torch.zeros_like(low)
    if scheme.symmetric:
        scales = torch.max(low.abs(), high.abs()) / (levels / 2)
    else:
        scales = (high - low) / levels
        zero_points = (scheme.low - low / scales).clamp(scheme.low, scheme.high).nan_to_num(0).round()
    scales = torch.where(scales == 0, torch.tensor(torch.finfo(weight.dtype).eps, dtype=weight.dtype), scales)
    scaled = blocks / scales[..., None, None] + zero_points[..., None, None]
    scaled = scaled.clamp(scheme.low, scheme.high).transpose(1, 2).reshape(weight.shape)
    codes = scaled.to(torch.float8_e4m3fn) if scheme.kind == "float" else scaled.round().to(torch.int8)
    return codes, scales, zero_points.to(torch.int8)


@pytest.mark.slow
@pytest.mark.parametrize("name", compressed.SCHEMES)
def test_compressed_tensors(instruction_set, name):
    scheme = compressed.SCHEMES[name]
    for array in every_kind(max(scheme.block_rows, 12)):
        codes, scales, zero_points = compressed.quantize(array, scheme)
        library = compressed_tensors(to_torch(array), scheme)
        assert bits(codes) == bits(library[0]) and bits(scales) == bits(library[1])
        assert zero_points is None if scheme.symmetric else bits(zero_points) == bits(library[2])
        values = compressed.dequantize(codes, scales, zero_points, scheme)
        wide = library[1].repeat_interleave(scheme.block_rows, 0).repeat_interleave(256 // scales.shape[1], 1)
        zeros = library[2].repeat_interleave(256 // scales.shape[1], 1).to(wide.dtype) if not scheme.symmetric else 0
        assert np.array_equal(
            values.astype(np.float32), ((library[0].to(wide.dtype) - zeros) * wide).float().numpy(), equal_nan=True
        )


def test_compressed_tensors_pads_blocks():
    array = rows("normal", 1, 200, 300).astype(BF16)
    padded = np.zeros((256, 384), BF16)
    padded[:200, :300] = array
    scheme = compressed.SCHEMES["fp8-block"]
    codes, scales, _ = compressed.quantize(array, scheme)
    expected, expected_scales, _ = compressed.quantize(padded, scheme)
    assert scales.shape == (2, 3) and bits(scales) == bits(expected_scales)
    assert bits(codes) == bits(expected[:200, :300])


def test_compressed_tensors_refuses_groups_that_do_not_fit():
    with pytest.raises(ValueError, match="multiple of the group size"):
        compressed.quantize(np.zeros((2, 100), np.float32), compressed.SCHEMES["w4a16"])


def test_torchao(instruction_set):
    for array in every_kind():
        weight = to_torch(array)
        scales = (torch.max(-weight.amin(1, True), weight.amax(1, True)) / 127.5).clamp(min=2**-23).float()
        expected = (weight * (1.0 / scales)).round().clamp(-128, 127).to(torch.int8)
        codes, stored_scales = torchao.quantize(array)
        assert bits(codes) == bits(expected) and bits(stored_scales) == bits(scales)
        values = torchao.dequantize(codes, stored_scales, array.dtype)
        assert bits(values) == bits((expected.to(weight.dtype) * scales).to(weight.dtype))


@pytest.mark.parametrize("n_bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_mlx_represents_the_edge_and_bounds_the_error(n_bits, group_size):
    for array in every_kind():
        codes, scales, biases = mlx.quantize(array, n_bits, group_size)
        assert codes.max() < 2**n_bits and scales.dtype == biases.dtype == array.dtype
        groups = array.astype(np.float32).reshape(*scales.shape, group_size)
        values = (
            codes.reshape(groups.shape) * scales.astype(np.float32)[..., None] + biases.astype(np.float32)[..., None]
        )
        spread = np.maximum(groups.max(2) - groups.min(2), 1e-6)
        largest = np.abs(groups).max(2)
        # Half a step (a whole one at the far end, which is shifted so that zero is on the grid), and the rounding of
        # scale and bias.
        rounding = {2: 2.0**-8, 4: 2.0**-22}[array.dtype.itemsize]
        smallest = {"float16": 2e-7 * 2**n_bits}.get(array.dtype.name, 1e-6)
        bound = spread / (2**n_bits - 1) + (largest + spread) * rounding + smallest
        assert (np.abs(values - groups).max(2) <= bound).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("n_bits", [4, 8])
def test_gptq_is_within_half_a_step(n_bits, symmetric):
    for kind in ("normal", "heavy-tailed", "zero", "sparse", "constant", "grid"):
        array = rows(kind, 2, 16, 512)
        codes, zeros, scales = gptq.quantize(array, n_bits, 128, symmetric)
        values = gptq.dequantize(codes, zeros, scales, np.arange(512) // 128)
        step = np.repeat(scales.astype(np.float32), 128, axis=1)
        # The largest value of a symmetric group lies half a step beyond the last code.
        assert (
            np.abs(values - array) <= step * (0.5 if n_bits == 8 and not symmetric else 1.01) + np.abs(array) / 1024
        ).all()
        assert symmetric is (len(np.unique(zeros)) == 1) or kind in ("zero", "constant", "grid")


@pytest.mark.parametrize("checkpoint_format", gptq.CHECKPOINT_FORMATS)
@pytest.mark.parametrize("n_bits", [4, 8])
def test_gptq_layout(n_bits, checkpoint_format):
    array = rows("normal", 5, 64, 256)
    encoder = gptq.Gptq(n_bits, 64, symmetric=False, checkpoint_format=checkpoint_format)
    parts = encoded(encoder, ArrayTensor(array), 7)
    codes, zeros, scales = gptq.quantize(array, n_bits, 64, symmetric=False)
    per_word = 32 // n_bits
    for column, row in [(0, 0), (17, 3), (255, 63), (128, 40)]:
        word = int(parts["qweight"][column // per_word, row]) & 0xFFFFFFFF
        assert word >> column % per_word * n_bits & 2**n_bits - 1 == codes[row, column]
        word = int(parts["qzeros"][column // 64, row // per_word]) & 0xFFFFFFFF
        stored = word >> row % per_word * n_bits & 2**n_bits - 1
        assert stored == (int(zeros[row, column // 64]) - (checkpoint_format == "gptq")) % 2**n_bits
        assert parts["scales"][column // 64, row] == scales[row, column // 64]
    assert np.array_equal(gptq.unpack_zeros(parts["qzeros"], n_bits, checkpoint_format), zeros.T)


def test_awq_layout(instruction_set):
    array = rows("normal", 6, 64, 256)
    parts = encoded(awq.Awq(128), ArrayTensor(array), 1)
    codes, zeros, scales = awq.quantize(array, 128)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    for place, output in enumerate(order):
        words = parts["qweight"].astype(np.int64) & 0xFFFFFFFF
        assert np.array_equal(words[:, 3] >> 4 * place & 15, codes[24 + output])
        words = parts["qzeros"].astype(np.int64) & 0xFFFFFFFF
        assert np.array_equal(words[:, 7] >> 4 * place & 15, zeros[56 + output])
    assert np.array_equal(parts["scales"], scales.T)
    assert np.array_equal(awq.unpack(parts["qweight"].T), codes)
    assert np.abs(awq.dequantize(codes, zeros, scales, 128) - array).max() <= scales.max()


def test_words_hold_codes_from_the_lowest_bits(instruction_set):
    assert bitpack.pack_words(np.arange(8, dtype=np.uint8), 4).tolist() == [0x76543210]
    assert bitpack.pack_words(np.array([1, 2, 3, 255], np.uint8), 8).tolist() == [0xFF030201]
    codes = np.random.default_rng(0).integers(0, 16, (3, 5, 64), np.uint8)
    assert np.array_equal(bitpack.unpack_words(bitpack.pack_words(codes, 4), 4), codes)
    with pytest.raises(ValueError, match="whole words"):
        bitpack.pack_words(codes[..., :63], 4)
    with pytest.raises(ValueError, match="7 bits"):
        bitpack.unpack_words(codes, 7)


def by_definition(rule: groups.Rule, x: np.ndarray, s: np.ndarray, z: np.ndarray, low: int, high: int) -> np.ndarray:
    """The codes of ``x``, computed in numpy from the definition of the rule."""
    if rule == groups.Rule.DIVIDE:
        return np.rint(np.clip(x / s + z, low, high))
    if rule == groups.Rule.FLOAT8:
        return np.clip(x / s + z, low, high).astype(compressed.FP8)
    if rule == groups.Rule.FLOAT4:
        return np.abs((x / s)[..., None] - float_codes.FLOAT4).argmin(-1).astype(np.uint8)
    if rule == groups.Rule.FLOAT4_EVEN:
        return np.clip(x / s, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    if rule == groups.Rule.RECIPROCAL:
        return np.clip(np.rint(x * (np.float32(1) / s)), low, high)
    if rule == groups.Rule.FROM_BIAS:
        return np.clip(np.rint((x - z) / s), low, high)
    return np.clip(np.rint(x / s) + z, low, high)


@pytest.mark.parametrize("rule", groups.Rule)
@pytest.mark.parametrize("shape", [(5, 64), (3, 37), (2, 1)])
def test_group_kernels_follow_their_definition(instruction_set, rule, shape):
    """Every rule, any width, a short last group."""
    for seed, width in enumerate((1, 7, 16, 32, 64)):
        array = rows("heavy-tailed", seed, *shape)
        count = -(-shape[1] // width)
        rng = np.random.default_rng(seed)
        scales, offsets = (
            rng.uniform(0.05, 2, (shape[0], count)).astype(np.float32),
            rng.integers(-3, 4, (shape[0], count)),
        )
        offsets = offsets.astype(np.float32)
        s, z = (np.repeat(array_by_group, width, axis=1)[:, : shape[1]] for array_by_group in (scales, offsets))
        low, high = (-448, 448) if rule == groups.Rule.FLOAT8 else (-8, 7)
        expected = by_definition(rule, array, s, z, low, high)
        parameters = groups.GroupScales(width, scales, offsets)
        codes = groups.quantize_groups(array, parameters, rule, low, high)
        if rule.name.startswith("FLOAT"):
            assert bits(codes) == bits(expected)
            continue
        assert np.array_equal(codes.view(np.int8), expected)
        assert np.array_equal(groups.dequantize_groups(codes.view(np.int8), parameters), (expected - z) * s)
        padded = np.pad(array, ((0, 0), (0, count * width - shape[1])), mode="edge").reshape(shape[0], count, width)
        least, most = groups.group_ranges(array, width)
        assert np.array_equal(least, padded.min(2)) and np.array_equal(most, padded.max(2))


def test_float8_rounds_every_value_as_ml_dtypes(instruction_set):
    tops = (np.arange(65536, dtype=np.uint32) << 16)[:, None]
    low = np.array([0, 1, 0x7FFF, 0x8000, 0xFFFF], np.uint32)
    values = (tops | low).view(np.float32).reshape(-1, 80)
    values = np.where(np.abs(values) <= 448, values, 1)
    ones = np.ones((len(values), 1), np.float32)
    codes = groups.quantize_groups(values, groups.GroupScales(80, ones), groups.Rule.FLOAT8, -448, 448)
    expected = (values + np.float32(0)).astype(compressed.FP8)
    assert bits(codes) == bits(expected)


def test_shapes_are_checked():
    array, ones = np.zeros((4, 64), np.float32), np.ones((4, 1), np.float32)
    with pytest.raises(ValueError, match="groups of 32"):
        groups.quantize_groups(array, groups.GroupScales(32, ones), groups.Rule.DIVIDE, -8, 7)
    with pytest.raises(ValueError, match="not float32"):
        groups.dequantize_groups(array, groups.GroupScales(64, ones))
