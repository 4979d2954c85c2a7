"""Mistakes in the values themselves: rounding through another type, wrong signs, nibbles in the wrong order."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from gemma2tool.model.lazy import BFLOAT16, FLOAT16, Array, DType, LazyTensor, to_float32
from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.diagnosis.names import MATRICES
from gemma2tool.verify.diagnosis.signature import Signature, Transform, Weights, elementwise
from gemma2tool.verify.diagnosis.views import Columns

_FLOAT16_MAX = np.float32(65504)
_FLOAT16_SMALLEST_NORMAL = np.float32(2.0**-14)


def _rounded(rows: Array, dtype: DType) -> Array:
    with np.errstate(over="ignore"):
        return to_float32(rows.astype(dtype))


def _rounded_to(dtype: DType) -> Transform:
    return elementwise(lambda rows: _rounded(rows, dtype))


def _truncated(rows: Array) -> Array:
    """float32 truncated instead of rounded to bfloat16."""
    bits = np.ascontiguousarray(rows).view(np.uint32) & np.uint32(0xFFFF0000)
    truncated: Array = bits.view(np.float32)
    return truncated


def _clipped(rows: Array) -> Array:
    return np.clip(rows, -_FLOAT16_MAX, _FLOAT16_MAX)


def _saturated(rows: Array) -> Array:
    return to_float32(_clipped(rows).astype(np.float16))


def _flushed(rows: Array) -> Array:
    """Through float16 on hardware without subnormal numbers."""
    return np.where(np.abs(rows) < _FLOAT16_SMALLEST_NORMAL, np.float32(0), _rounded(rows, FLOAT16))


def _became_infinite(comparison: TensorComparison) -> bool:
    return comparison.nonfinite > comparison.source_nonfinite


def _permuted_in_runs(order: tuple[int, ...]) -> Transform:
    """Columns permuted within runs as long as ``order``."""

    def transform(weights: Weights, name: str) -> LazyTensor | None:
        source = weights[name]
        if source.shape[-1] % len(order):
            return None
        starts = np.arange(0, source.shape[-1], len(order))
        return Columns(source, (starts[:, None] + np.array(order)).reshape(-1))

    return transform


_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_EVEN_ODD_OF_32 = tuple(range(0, 32, 2)) + tuple(range(1, 32, 2))

SIGNATURES = (
    Signature(
        "numbers.fp16-overflow",
        (),
        "{what} {have} infinite values: they were rounded through float16, whose largest value is 65504",
        _rounded_to(FLOAT16),
        exact=True,
        needs=_became_infinite,
    ),
    Signature(
        "numbers.fp16-rounding",
        (),
        "{what} {have} been rounded through float16: small values have lost bits that float16 cannot hold, the "
        "others equal the source bit for bit",
        _rounded_to(FLOAT16),
        exact=True,
    ),
    Signature(
        "numbers.fp16-overflow",
        (),
        "{what} {have} values clipped to 65504, the largest of float16",
        elementwise(_clipped),
        exact=True,
    ),
    Signature(
        "numbers.fp16-overflow",
        (),
        "{what} {have} values clipped to 65504, and {have} been rounded through float16",
        elementwise(_saturated),
        exact=True,
    ),
    Signature(
        "numbers.fp16-flushed",
        (),
        "{what} {have} been rounded through float16 without subnormal numbers: values below 2^-14 are zero",
        elementwise(_flushed),
        exact=True,
    ),
    Signature(
        "numbers.bf16-rounding",
        (),
        "{what} {have} been rounded through bfloat16: 16 bits of every float32 are lost",
        _rounded_to(BFLOAT16),
        exact=True,
    ),
    Signature(
        "numbers.bf16-truncation",
        (),
        "{what} {are} truncated instead of rounded to bfloat16: every value is closer to zero than it should be",
        elementwise(_truncated),
        exact=True,
    ),
    *(
        Signature(
            "numbers.fp8-rounding",
            (),
            f"{{what}} {{have}} been rounded through {name}, an 8-bit float, and stored in a wider type: most bits of "
            "every value are lost",
            _rounded_to(np.dtype(dtype)),
            exact=True,
        )
        for name, dtype in (
            ("float8_e4m3", ml_dtypes.float8_e4m3fn),
            ("float8_e5m2", ml_dtypes.float8_e5m2),
        )
    ),
    Signature("numbers.negated", (), "{what} {have} the wrong sign", elementwise(np.negative)),
    Signature(
        "quant.nibbles-swapped",
        MATRICES,
        "in {what}, the two columns of every pair are exchanged: the low and high nibbles of every byte were swapped",
        _permuted_in_runs((1, 0)),
    ),
    Signature(
        "quant.nibble-order",
        MATRICES,
        "in {what}, every eight columns are in AWQ's order of nibbles (0, 2, 4, 6, 1, 3, 5, 7)",
        _permuted_in_runs(_AWQ_ORDER),
    ),
    Signature(
        "quant.nibble-order",
        MATRICES,
        "in {what}, AWQ's order of nibbles (0, 2, 4, 6, 1, 3, 5, 7) was undone in every eight columns, which were "
        "not in that order",
        _permuted_in_runs(tuple(np.argsort(_AWQ_ORDER))),
    ),
    Signature(
        "quant.nibble-order",
        MATRICES,
        "in {what}, every block of 32 was unpacked as even and odd columns, but ggml keeps the first half in the low "
        "nibbles and the second in the high ones",
        _permuted_in_runs(_EVEN_ODD_OF_32),
    ),
    Signature(
        "quant.nibble-order",
        MATRICES,
        "in {what}, every block of 32 was unpacked as two halves, but its low and high nibbles are even and odd "
        "columns",
        _permuted_in_runs(tuple(np.argsort(_EVEN_ODD_OF_32))),
    ),
)
