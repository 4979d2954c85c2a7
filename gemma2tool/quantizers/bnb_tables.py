"""The values of bitsandbytes' types: nf4, fp4, and the "dynamic" 8-bit type that double quantization uses for absmax.

They are constants because checkpoints contain them and the library computes the dynamic map with torch.linspace, whose
last bits depend on the vector width of torch's build. These are the values on every x86-64 machine with AVX2.
"""

from __future__ import annotations

import functools

import numpy as np

from gemma2tool.model.lazy import Array

BLOCKSIZE = 64
"""Values of a 4-bit tensor that share a scale, unless the library is told otherwise."""
NESTED_BLOCKSIZE = 256
"""Scales that share a scale of their own under double quantization."""

CODES = {
    # Quantiles of the normal distribution, from the library's table.
    "nf4": np.array(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
         0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32
    ),
    # Sign, two exponent bits, one mantissa bit, over 12.
    "fp4": np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12),
}  # fmt: skip
"""The 16 values of each 4-bit type, by code."""

ASCENDING = {
    "nf4": np.arange(16, dtype=np.uint8),
    "fp4": np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8),
}
"""The codes from the smallest value to the largest. fp4 has zero twice: code 0 rounds from below, code 8 from above."""


def _midpoints(quant_type: str) -> Array:
    values = CODES[quant_type][ASCENDING[quant_type]]
    midpoints: Array = (values[:-1] + values[1:]) / np.float32(2)
    return midpoints


MIDPOINTS = {quant_type: _midpoints(quant_type) for quant_type in CODES}
"""The midpoints between neighboring values; a number on a midpoint is rounded to the smaller value."""

# fmt: off
_DYNAMIC_MAGNITUDES = np.array([
    5.5000004e-07,
    3.2500002e-06, 7.75e-06,
    2.1249998e-05, 4.375e-05, 6.625e-05, 8.875e-05,
    0.00015625001, 0.00026875004, 0.00038125002, 0.00049375003, 0.0006062501, 0.00071875006, 0.00083125, 0.0009437501,
    0.0012812499, 0.00184375, 0.00240625, 0.00296875, 0.0035312497, 0.00409375, 0.0046562497, 0.0052187503,
    0.00578125, 0.00634375, 0.00690625, 0.00746875, 0.00803125, 0.00859375, 0.009156249, 0.00971875,
    0.01140625, 0.01421875, 0.01703125, 0.019843752, 0.02265625, 0.02546875, 0.028281251, 0.03109375, 0.03390625,
    0.036718752, 0.03953125, 0.042343747, 0.04515625, 0.04796875, 0.05078125, 0.05359375, 0.05640625, 0.059218753,
    0.06203125, 0.06484375, 0.067656256, 0.070468746, 0.07328125, 0.07609375, 0.07890625, 0.08171876, 0.08453125,
    0.08734375, 0.09015625, 0.092968754, 0.09578126, 0.09859375,
    0.107031256, 0.12109375, 0.13515624, 0.14921875, 0.16328125, 0.17734376, 0.19140625, 0.20546874, 0.21953125,
    0.23359375, 0.24765624, 0.26171875, 0.27578127, 0.28984374, 0.30390626, 0.31796873, 0.33203125, 0.34609374,
    0.36015624, 0.37421876, 0.38828123, 0.40234375, 0.41640624, 0.43046874, 0.44453126, 0.45859373, 0.47265625,
    0.4867187, 0.50078124, 0.5148437, 0.5289062, 0.54296875, 0.5570313, 0.5710938, 0.58515626, 0.5992187, 0.61328125,
    0.6273438, 0.6414063, 0.65546876, 0.6695312, 0.68359375, 0.6976563, 0.7117188, 0.72578126, 0.7398437, 0.75390625,
    0.7679688, 0.78203124, 0.79609376, 0.8101562, 0.82421875, 0.8382813, 0.85234374, 0.86640626, 0.8804687,
    0.89453125, 0.9085938, 0.92265624, 0.93671876, 0.9507812, 0.96484375, 0.9789063, 0.99296874,
], np.float32)
# fmt: on


@functools.cache
def dynamic_map() -> Array:
    """The 256 values of the signed dynamic type, ascending, float32 within [-0.993, 1].

    They are seven decades with both signs, each with twice as many evenly spaced values as the next smaller one; 0; and
    1, which has no negative counterpart (Dettmers, arXiv 1511.04561).
    """
    table = np.concatenate(
        [-_DYNAMIC_MAGNITUDES[::-1], np.zeros(1, np.float32), _DYNAMIC_MAGNITUDES, np.ones(1, np.float32)]
    )
    table.flags.writeable = False
    return table


@functools.cache
def dynamic_bins() -> Array:
    """The nearest code of ``dynamic_map`` for each of 65536 steps from -1 to 1, uint8: the lookup table of the CPU
    library."""
    numbers = dynamic_map()
    midpoints = np.float32(0.5) * (numbers[:-1] + numbers[1:])
    steps = np.float32(-1) + np.arange(65536, dtype=np.float32) * np.float32(2) / np.float32(65535)
    bins = np.searchsorted(midpoints, steps).astype(np.uint8)
    bins.flags.writeable = False
    return bins
