"""nf4, fp4, double quantization and LLM.int8() against bitsandbytes' own CPU functions, byte for byte, in every
instruction set."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2tool.errors import InputRefused
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.quantizers import bnb, kernels
from gemma2tool.quantizers.bnb_tables import ASCENDING, CODES, MIDPOINTS, dynamic_map
from tests.support.kernel_data import ROWS, rows
from tests.support.peers import Peer

pytestmark = [pytest.mark.peer, pytest.mark.slow]  # the library imports all of torch's compilers

F = Peer("bitsandbytes.functional")

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BF16]
FOUR_BIT = ["nf4", "fp4"]


@pytest.fixture(params=kernels.available_instruction_sets())
def instruction_set(request):
    before = kernels.current_instruction_set()
    kernels.use_instruction_set(request.param)
    yield request.param
    kernels.use_instruction_set(before)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """From 32,768 values, the last bit of torch's mean depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def same(actual: np.ndarray, expected: torch.Tensor) -> bool:
    expected = expected.numpy()
    return actual.dtype == expected.dtype and np.array_equal(actual, expected, equal_nan=actual.dtype.kind == "f")


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def assert_four_bit(array: np.ndarray, quant_type: str) -> None:
    """Assert that codes and absmax of ``array`` equal the library's."""
    packed, absmax = bnb.quantize_4bit(array.reshape(-1), quant_type)
    expected, state = F.quantize_4bit(to_torch(array), quant_type=quant_type)
    assert same(absmax, state.absmax)
    assert same(packed, expected[:, 0])


def around_midpoints(quant_type: str, absmax: float) -> np.ndarray:
    """Rows (15, 64): each a block with that absmax, whose other values are within a few units of one midpoint times
    absmax."""
    middle = MIDPOINTS[quant_type][:, None] * np.float32(absmax)
    step = np.spacing(np.abs(middle)) + (middle == 0) * np.float32(1e-45)
    values = (middle + np.arange(-32, 32, dtype=np.float32) * step).astype(np.float32)
    values[:, 0] = absmax
    return values


def test_tables_are_the_librarys():
    for quant_type in FOUR_BIT:
        code = F.get_4bit_type(quant_type, device="cpu")
        order = torch.argsort(code)
        assert CODES[quant_type].tobytes() == code.numpy().tobytes()
        assert np.array_equal(ASCENDING[quant_type], order.numpy())
        assert same(MIDPOINTS[quant_type], (code[order[:-1]] + code[order[1:]]) / 2)
    assert dynamic_map().tobytes() == F.create_dynamic_map().numpy().tobytes()


@pytest.mark.parametrize("quant_type", FOUR_BIT)
@pytest.mark.parametrize("kind", ROWS)
def test_four_bit_of_every_kind_of_rows(instruction_set, quant_type, kind):
    for dtype in DTYPES:
        assert_four_bit(cast(rows(kind, 1, 6, 512), dtype), quant_type)


@pytest.mark.parametrize("quant_type", FOUR_BIT)
def test_four_bit_next_to_midpoints(instruction_set, quant_type):
    for absmax in (1.0, 0.7310586, 3e-39, 2.5e38, 0.0123, 7e-20):
        assert_four_bit(around_midpoints(quant_type, absmax), quant_type)
    assert_four_bit(cast(around_midpoints(quant_type, 1.7), BF16), quant_type)


@pytest.mark.slow
@pytest.mark.parametrize("quant_type", FOUR_BIT)
@pytest.mark.parametrize("n", [1, 2, 3, 31, 63, 64, 65, 100, 127, 128, 129, 1000])
def test_four_bit_of_every_length(instruction_set, quant_type, n):
    for scale in (1, 1e-41, 0):
        for dtype in DTYPES:
            assert_four_bit(cast(rows("heavy-tailed", n, 1, n) * np.float32(scale), dtype), quant_type)


@pytest.mark.parametrize("quant_type", FOUR_BIT)
def test_four_bit_of_nonfinite_values(instruction_set, quant_type):
    array = rows("normal", 0, 4, 80)
    array[0, 3], array[1, 5], array[2, 0], array[3, 79] = np.nan, np.inf, -np.inf, np.nan
    assert_four_bit(array, quant_type)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=200),
    st.sampled_from(DTYPES),
    st.sampled_from(FOUR_BIT),
)
def test_four_bit_of_anything(values, dtype, quant_type):
    assert_four_bit(cast(np.array(values, np.float32), dtype), quant_type)


@pytest.mark.parametrize("quant_type", FOUR_BIT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_four_bit_dequantizes_as_the_library_does(instruction_set, quant_type, dtype):
    array = cast(rows("heavy-tailed", 5, 24, 512), dtype)
    packed, state = F.quantize_4bit(to_torch(array), quant_type=quant_type)
    actual = bnb.dequantize_4bit(packed.numpy()[:, 0], state.absmax.numpy(), quant_type, array.size, dtype)
    assert actual.dtype == dtype
    assert same(actual.astype(np.float32), F.dequantize_4bit(packed, state).float().reshape(-1))


@pytest.mark.parametrize("blocksize", bnb.BLOCKSIZES[:4])
def test_four_bit_dequantizes_other_block_sizes_and_lengths(instruction_set, blocksize):
    rng = np.random.default_rng(blocksize)
    for count in (1, 31, 33, 100, 127, 3 * blocksize, 3 * blocksize + 17):
        packed = rng.integers(0, 256, -(-count // 2), np.uint8)
        absmax = rng.random(-(-count // blocksize), np.float32)
        codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[:count]
        want = CODES["fp4"][codes] * np.repeat(absmax, blocksize)[:count]
        assert np.array_equal(bnb.dequantize_4bit(packed, absmax, "fp4", count, np.float32, blocksize), want)
        assert np.array_equal(bnb.dequantize_4bit(packed, absmax, "fp4", count, BF16, blocksize), want.astype(BF16))
    with pytest.raises(ValueError, match="do not hold"):
        bnb.dequantize_4bit(packed, absmax[:-1], "fp4", count, np.float32, blocksize)


@pytest.mark.parametrize("scale", [1, 1e-3, 1e-39, 0])
def test_8bit_of_absmax(instruction_set, scale):
    values = rows("normal", 3, 1, 5000).reshape(-1) * np.float32(scale)
    values[256:512] = np.linspace(-1, 1, 256)
    codes, absmax = bnb.quantize_8bit(values)
    expected, state = F.quantize_blockwise(torch.from_numpy(values), blocksize=256)
    assert same(codes, expected) and same(absmax, state.absmax)
    actual = bnb.dequantize_8bit(codes, absmax, dynamic_map())
    assert same(actual, F.dequantize_blockwise(expected, state))


def test_8bit_of_every_bin(instruction_set):
    values = np.linspace(-1, 1, 262144, dtype=np.float32).reshape(-1, 128)
    values = np.concatenate([np.repeat([[1.0]], len(values), 0).astype(np.float32), values], 1).reshape(-1)
    assert same(bnb.quantize_8bit(values)[0], F.quantize_blockwise(torch.from_numpy(values), blocksize=256)[0])


@pytest.mark.parametrize("n", [1, 2, 5, 7, 8, 9, 31, 32, 63, 511, 512, 1000, 4097, 32767, 66000, 331776])
def test_mean_adds_in_torchs_order(n):
    for seed, scale in enumerate((1, 1e-3, 1e4)):
        values = np.abs(rows("heavy-tailed", seed, 1, n).reshape(-1)) * np.float32(scale)
        assert float(bnb.mean_float32(values)) == torch.from_numpy(values).mean().item()


def all_bits(dtype: np.dtype) -> np.ndarray:
    """Every bit pattern of a 16-bit float, (256, 256): a row for each upper byte."""
    return np.arange(65536, dtype=np.uint16).reshape(256, 256).view(dtype)


def assert_int8(array: np.ndarray) -> None:
    codes, absmax = bnb.quantize_int8(array)
    expected, stats, _ = F.int8_vectorwise_quant(to_torch(array).to(torch.float16))
    assert same(codes, expected) and same(absmax, stats)
    assert same(bnb.dequantize_int8(codes, absmax), F.int8_vectorwise_dequant(expected, stats))


@pytest.mark.parametrize("kind", ROWS)
def test_int8_of_every_kind_of_rows(instruction_set, kind):
    for dtype in DTYPES:
        assert_int8(cast(rows(kind, 2, 7, 512), dtype))


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BF16], ids=str)
def test_int8_of_every_16_bit_value(instruction_set, dtype):
    assert_int8(all_bits(dtype))
    assert_int8(np.ascontiguousarray(all_bits(dtype)[:, 5:42]))


def test_int8_rounds_to_half_as_torch_does(instruction_set):
    tops = (np.arange(65536, dtype=np.uint32) << 16)[:, None]
    ties = tops | np.array([0, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0xFFFF], np.uint32)
    values = ties.view(np.float32).reshape(4096, 128)
    assert_int8(values[np.isfinite(values).all(1)])


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=150),
    st.sampled_from(DTYPES),
)
def test_int8_of_anything(values, dtype):
    assert_int8(cast(np.array([values, values[::-1]], np.float32), dtype))


def encoded(encoder, array: np.ndarray, rows_at_once: int) -> dict[str, bytes]:
    """Every part of ``array`` as bytes, encoded from ranges of rows; checks the types and sizes that the encoder
    declares."""
    step = encoder.row_multiple(array.shape) * rows_at_once
    pieces = [encoder.encode(array[first : first + step]) for first in range(0, len(array), step)]
    whole = {suffix: np.concatenate([piece[suffix] for piece in pieces]) for suffix in pieces[0]}
    fixed = encoder.finish(array.shape, {suffix: whole[suffix] for suffix in encoder.collects})
    result = {}
    for part in encoder.parts(array.shape):
        stored = whole[part.suffix] if part.streamed else fixed[part.suffix]
        dtype = {"U8": np.uint8, "F32": np.float32, "I8": np.int8}[part.dtype]
        assert (stored.dtype, stored.shape, stored.nbytes) == (dtype, part.shape, part.nbytes)
        result[part.suffix] = stored.tobytes()
    return result


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", FOUR_BIT)
@pytest.mark.parametrize("shape", [(96, 256), (40, 48), (7, 9), (130, 200), (1, 1)])
def test_encoder_writes_the_librarys_state_dict_from_any_ranges(quant_type, double_quant, shape):
    for dtype in DTYPES:
        array = cast(rows("heavy-tailed", 9, *shape) * np.float32(0.02), dtype)
        source = ArrayTensor(array)
        encoder = bnb.FourBit(quant_type, double_quant, dtype).surveyed(source, chunk_bytes=1000)
        packed, state = F.quantize_4bit(to_torch(array), quant_type=quant_type, compress_statistics=double_quant)
        expected = {f".{key}": tensor.numpy().tobytes() for key, tensor in state.as_dict(packed=True).items()}
        expected[""] = packed.numpy().tobytes()
        for rows_at_once in (1, 3, 1000):
            assert encoded(encoder, array, rows_at_once) == expected


def test_encoder_casts_to_the_type_the_weight_is_loaded_in():
    array = rows("normal", 4, 16, 128)
    encoder = bnb.FourBit("nf4", dtype=BF16)
    assert encoded(encoder, array, 4) == encoded(encoder, array.astype(BF16), 16)
    assert encoded(encoder, array, 4) != encoded(bnb.FourBit("nf4", dtype=np.dtype(np.float32)), array, 4)
    state = json.loads(encoded(encoder, array, 4)[".quant_state.bitsandbytes__nf4"])
    assert state == {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [16, 128]}


def test_double_quantization_needs_the_survey_of_that_tensor():
    array = rows("normal", 4, 16, 128)
    encoder = bnb.FourBit("nf4", double_quant=True)
    with pytest.raises(ValueError, match="survey"):
        encoder.parts(array.shape)
    surveyed = encoder.surveyed(ArrayTensor(array))
    with pytest.raises(ValueError, match="different tensor"):
        encoded(surveyed, array * 2, 4)
    array[3, 3] = np.nan
    with pytest.raises(InputRefused, match="NaN"):
        encoder.surveyed(ArrayTensor(array, origin="model.ckpt: q_proj"))


def test_int8_encoder(instruction_set):
    array = rows("heavy-tailed", 4, 33, 70)
    codes, stats, _ = F.int8_vectorwise_quant(torch.from_numpy(array).to(torch.float16))
    for rows_at_once in (1, 8, 33):
        assert encoded(bnb.Int8(), array, rows_at_once) == {
            "": codes.numpy().tobytes(),
            "SCB": stats.numpy().tobytes(),
            "weight_format": b"\0",
        }
