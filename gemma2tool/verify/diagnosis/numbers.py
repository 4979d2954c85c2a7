"""Mistakes in the numbers themselves: rounded through a type that no one asked for, signs turned, nibbles in the wrong order."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from gemma2tool.model.lazy import BFLOAT16, FLOAT16, LazyTensor, to_float32
from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.diagnosis.names import MATRICES
from gemma2tool.verify.diagnosis.signature import Signature, Transform, Weights, values
from gemma2tool.verify.diagnosis.views import Columns

_LARGEST = np.float32(65504)
_SMALLEST_NORMAL = np.float32(2.0**-14)


def _through(dtype: np.dtype):
    def function(rows: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return to_float32(rows.astype(dtype))

    return function


def _truncated(rows: np.ndarray) -> np.ndarray:
    """float32 cut off, not rounded, to bfloat16."""
    return (np.ascontiguousarray(rows).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _clipped(rows: np.ndarray) -> np.ndarray:
    return np.clip(rows, -_LARGEST, _LARGEST)


def _saturated(rows: np.ndarray) -> np.ndarray:
    return to_float32(_clipped(rows).astype(np.float16))


def _flushed(rows: np.ndarray) -> np.ndarray:
    """Through float16 on hardware that has no subnormal numbers."""
    return np.where(np.abs(rows) < _SMALLEST_NORMAL, np.float32(0), _through(FLOAT16)(rows))


def _infinite(found: TensorComparison) -> bool:
    return found.nonfinite > found.source_nonfinite


def _by_pieces(order: tuple[int, ...]) -> Transform:
    """Columns permuted within pieces of the order's length."""

    def transform(weights: Weights, name: str) -> LazyTensor | None:
        source = weights[name]
        if source.shape[-1] % len(order):
            return None
        starts = np.arange(0, source.shape[-1], len(order))
        return Columns(source, (starts[:, None] + np.array(order)).reshape(-1))

    return transform


_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
_HALVES = tuple(range(0, 32, 2)) + tuple(range(1, 32, 2))

SIGNATURES = (
    Signature(
        "numbers.fp16-overflow",
        (),
        "{what} {have} infinite values: they went through float16, which ends at 65504",
        values(_through(FLOAT16)),
        exact=True,
        needs=_infinite,
    ),
    Signature(
        "numbers.fp16-rounding",
        (),
        "{what} went through float16: small values have lost bits that float16 cannot hold, the rest is the source's, bit for bit",
        values(_through(FLOAT16)),
        exact=True,
    ),
    Signature(
        "numbers.fp16-overflow",
        (),
        "{what} {have} values cut off at 65504, where float16 ends",
        values(_clipped),
        exact=True,
    ),
    Signature(
        "numbers.fp16-overflow",
        (),
        "{what} {have} values cut off at 65504: they went through float16",
        values(_saturated),
        exact=True,
    ),
    Signature(
        "numbers.fp16-flushed",
        (),
        "{what} went through float16 without subnormal numbers: values below 2^-14 are zero",
        values(_flushed),
        exact=True,
    ),
    Signature(
        "numbers.bf16-rounding",
        (),
        "{what} went through bfloat16: 16 bits of each float32 are lost",
        values(_through(BFLOAT16)),
        exact=True,
    ),
    Signature(
        "numbers.bf16-truncation",
        (),
        "{what} {are} cut off to bfloat16, not rounded: every value is nearer to zero than it should be",
        values(_truncated),
        exact=True,
    ),
    *(
        Signature(
            "numbers.fp8-rounding",
            (),
            f"{{what}} {{have}} been rounded through {name}, an 8-bit float, and stored in a wider type: most bits of each value are lost",
            values(_through(np.dtype(dtype))),
            exact=True,
        )
        for name, dtype in (
            ("float8_e4m3", ml_dtypes.float8_e4m3fn),
            ("float8_e5m2", ml_dtypes.float8_e5m2),
        )
    ),
    Signature("numbers.negated", (), "{what} {have} the wrong sign", values(np.negative)),
    Signature(
        "quant.nibbles-swapped",
        MATRICES,
        "in {what} the columns of each pair are exchanged: the low and the high nibble of each byte were taken for each other",
        _by_pieces((1, 0)),
    ),
    Signature(
        "quant.nibble-order",
        MATRICES,
        "in {what} each eight columns are in AWQ's order of nibbles (0, 2, 4, 6, 1, 3, 5, 7)",
        _by_pieces(_AWQ),
    ),
    Signature(
        "quant.nibble-order",
        MATRICES,
        "in {what} each eight columns were taken out of AWQ's order of nibbles (0, 2, 4, 6, 1, 3, 5, 7), in which they were not",
        _by_pieces(tuple(np.argsort(_AWQ))),
    ),
    Signature(
        "quant.nibble-order",
        MATRICES,
        "in {what} each block of 32 was unpacked as even and odd columns, where ggml keeps a half in the low nibbles and a half in the"
        " high ones",
        _by_pieces(_HALVES),
    ),
    Signature(
        "quant.nibble-order",
        MATRICES,
        "in {what} each block of 32 was unpacked as two halves, where its nibbles are even and odd columns",
        _by_pieces(tuple(np.argsort(_HALVES))),
    ),
)
