"""Codes and scales that are floats of one byte or less: float4 (E2M1), float8 (E4M3), and powers of two (E8M0).

Source: OCP Microscaling Formats (MX) 1.0.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from gemma2tool.model.lazy import Array, DType
from gemma2tool.quantizers.casts import cast

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FP8_MAX = 448.0
SMALLEST_FP8 = 2.0**-9
FLOAT4_MAX = 6.0

FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The value of each code of four bits."""

FLOAT8 = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)
"""The value of each byte."""

POWERS_OF_TWO = np.array([2.0**exponent for exponent in range(-127, 128)] + [np.inf], np.float32)
"""float8_e8m0: byte - 127 is the exponent. 255 is NaN; MLX reads it as infinity."""

_LOWEST, _HIGHEST = 2.0**-126, 2.0**127


def nearest_power(scales: Array) -> Array:
    """float32 scales rounded to powers of two, by the nearest exponent; what is not positive becomes the smallest."""
    exponents = np.rint(np.log2(np.clip(scales, _LOWEST, _HIGHEST))).astype(np.int32)
    powers: Array = POWERS_OF_TWO[exponents + 127]
    return powers


def nearest_fp8(scales: Array) -> Array:
    """float32 scales rounded to the positive ones of float8."""
    rounded: Array = np.clip(scales, SMALLEST_FP8, FP8_MAX).astype(FP8).astype(np.float32)
    return rounded


def scaled(values: Array, scales: Array, dtype: DType) -> Array:
    """float32 values (n, I) times the scales (n, G) of their groups of columns, rounded to ``dtype``."""
    with np.errstate(over="ignore", invalid="ignore"):
        products = values.reshape(*scales.shape, -1) * scales[..., None]
    return cast(products.reshape(values.shape), dtype)


def exponent_bytes(powers: Array) -> Array:
    """The bytes, uint8, of float32 powers of two."""
    return (np.frexp(powers)[1] + 126).astype(np.uint8)
