"""Float casts: every 16-bit value, the rounding of every float32 exponent, and NaN, against numpy, ml_dtypes and
torch."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.quantizers import kernels
from gemma2tool.quantizers.casts import cast, count_nonfinite

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(params=kernels.available_instruction_sets(), autouse=True)
def instruction_set(request):
    before = kernels.current_instruction_set()
    kernels.use_instruction_set(request.param)
    yield request.param
    kernels.use_instruction_set(before)


def floats_around_every_rounding() -> np.ndarray:
    """Float32 values on, just below and just above ties of both 16-bit formats, for every exponent and sign; no NaN."""
    top = np.arange(0x10000, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = (top[:, None] | low).ravel().view(np.float32)
    return values[~np.isnan(values)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float16, BF16], ids=str)
def test_narrowing_rounds_as_numpy_does(dtype):
    x = floats_around_every_rounding()
    with np.errstate(over="ignore"):
        want = x.astype(dtype)
    assert np.array_equal(cast(x, dtype).view(np.uint16), want.view(np.uint16))


@pytest.mark.parametrize("dtype", [np.float16, BF16], ids=str)
def test_widening_every_value(dtype):
    h = np.arange(0x10000, dtype=np.uint16).view(dtype)
    got, want = cast(h, np.float32), h.astype(np.float32)
    nan = np.isnan(want)
    assert np.array_equal(got[~nan].view(np.uint32), want[~nan].view(np.uint32))
    assert np.isnan(got[nan]).all() and np.array_equal(np.signbit(got), np.signbit(want))


def test_between_the_16_bit_formats():
    b = np.arange(0x10000, dtype=np.uint16).view(BF16)
    b = b[~np.isnan(b.astype(np.float32))]
    with np.errstate(over="ignore"):
        assert np.array_equal(
            cast(b, np.float16).view(np.uint16), b.astype(np.float32).astype(np.float16).view(np.uint16)
        )
    h = np.arange(0x10000, dtype=np.uint16).view(np.float16)
    h = h[~np.isnan(h)]
    assert np.array_equal(cast(h, BF16).view(np.uint16), h.astype(np.float32).astype(BF16).view(np.uint16))


def test_nan_bits_are_those_ggml_writes():
    x = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0x7F812345] * 5, np.uint32).view(
        np.float32
    )
    assert [hex(v) for v in cast(x, np.float16).view(np.uint16)[:6]] == [
        "0x7e00",
        "0xfe00",
        "0x7e00",
        "0xfe00",
        "0x7e00",
        "0x7e00",
    ]
    assert [hex(v) for v in cast(x, BF16).view(np.uint16)[:6]] == [
        "0x7fc0",
        "0xffc0",
        "0x7fc0",
        "0xffc0",
        "0x7fff",
        "0x7fc1",
    ]


@pytest.mark.parametrize("n", [0, 1, 7, 15, 16, 17, 31, 1000])
def test_every_length_and_out(n):
    x = np.linspace(-3, 3, n, dtype=np.float32)
    for dtype in (np.float16, BF16):
        out = np.full(n + 1, 7, dtype)
        assert cast(x, dtype, out=out[:n]).base is out
        assert np.array_equal(out[:n], x.astype(dtype)) and out[n] == 7
        assert np.array_equal(cast(out[:n], np.float32), x.astype(dtype).astype(np.float32))


def test_shapes_strides_and_refusals():
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert np.array_equal(cast(x[:, ::2].T, np.float16), x[:, ::2].T.astype(np.float16))
    assert cast(x, np.float32) is x
    with pytest.raises(ValueError, match="cannot cast"):
        cast(x, np.float64)
    with pytest.raises(ValueError, match="out must be"):
        cast(x, np.float16, out=np.empty((6, 4), np.float16))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16], ids=str)
def test_count_nonfinite(dtype):
    x = np.zeros(100_003, dtype)
    assert count_nonfinite(x) == 0
    x[[0, 1, 17, 70_000, 100_002]] = [np.nan, np.inf, -np.inf, np.nan, np.inf]
    assert count_nonfinite(x) == 5
    assert count_nonfinite(np.full(200_000, np.nan, dtype)) == 200_000
