"""How far a quantized tensor may be from its source: one row per stored type.

Errors are measured in blocks, the runs of consecutive values that share a scale, as fractions of the block's largest
magnitude (absmax).

Rounding types (scale from absmax or from the range, each value to the nearest code) have bounds that follow from their
definition, and an *anchor*: the value that sets the scale is stored as the outermost code, so its error is at most that
of rounding the scale itself. A wrong scale, however slightly wrong, moves the anchor first.

Search types (K-quants, IQ) trade the error of one value against another's, so only a ceiling is known for them. The
ceilings are the largest error seen over normal, Student-t, Laplace, uniform, one-sided, outlier-ridden and tiny-valued
blocks, quantized by ggml itself, plus a quarter or more; tests/verify/compare/test_bounds.py measures them again.
(Weights of which nine tenths are zeros are left out: IQ3_S returns them with errors as large as the weights, which
deserves an alarm.)

An importance matrix makes every ggml type except Q8_0 and the ternary ones a search type, in which a value that the
matrix calls unimportant may lose most of itself: ``weighted`` is the ceiling in that case, and ``WEIGHTED_RMSE`` the
factor of the RMSE's ceiling. Calibration goes further: a code may be steps away from the nearest to make up for the
errors of other columns, as far as ``calibrated``: at least twice the largest error seen for any type, with as few as
96 tokens of calibration, where codes wander the farthest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from gemma2tool.model.format_facts import Rounding
from gemma2tool.quantizers.bnb_tables import BLOCKSIZE, CODES

_F16 = 2.0**-11
"""Largest relative error of rounding to float16."""

_F16_STEP = 2.0**-25
"""Largest absolute error of rounding to float16 below its normal range."""


def _half_gap(codes: Sequence[float]) -> float:
    """Largest distance from any value in [-1, 1] to its nearest code."""
    ordered = sorted(codes)
    return max(b - a for a, b in pairwise(ordered)) / 2


_SMALLEST = 2.0**-126
"""The smallest normal float32."""
_NF4 = _half_gap(CODES["nf4"].tolist())
_FP4 = _half_gap(CODES["fp4"].tolist())

DYNAMIC_MAP_GAP = 0.9 / 64
"""Largest gap between neighboring codes of bitsandbytes' 8-bit "dynamic" map of block scales, as a fraction of the
largest."""

WEIGHTED_RMSE = 2.5
"""Factor of the RMSE's ceiling with an importance matrix. Q6_K loses the most, from 0.031 to 0.097 on outliers."""
CALIBRATED = 2.5
"""Factor of ``weighted`` for calibrated codes. On the trained fixture Q3_K loses the most, 1.1 times ``weighted``."""

_EIGHT_BITS = 0.3
"""``calibrated`` of types with 8 bits: on the trained fixture with 96 tokens, codes wander by up to 0.147 of absmax in
Q8_0, 0.139 in w8a16 and 0.103 in mlx-8.
"""

WEIGHTED_RMSE_MAX = 0.95
"""The ceiling stays below 1, at which nothing of a tensor is left."""


@dataclass(frozen=True)
class Bound:
    """Limits on the error of one stored type. Fractions are of the block's absmax.

    ``block``: number of values that share a scale (0: a row of the matrix, or the candidate's group size).
    ``worst``: limit on the error of any value, and ``anchor``: on that of the value of largest magnitude, as
    fractions; infinite if there is none. ``floor``: absolute error that is always allowed, because the scale has a
    smallest step. ``relative_rmse``: limit on RMSE / RMS of a whole tensor. ``weighted``: ``worst`` with an
    importance matrix (None: the type ignores it), ``calibrated``: with a calibration (None: ``CALIBRATED`` times
    that), and ``calibrated_rmse``: ``relative_rmse`` with one (None: ``WEIGHTED_RMSE`` times that). ``nearest``:
    ``worst`` if every code is the nearest one, for types whose codes may also be calibrated against inputs and then
    compensate for each other's errors. ``codes``: the outermost code, if its scale is of
    the model's type (whose smallest step is then multiplied by it). ``nested``: block scales are themselves
    quantized, 256 at a time (bitsandbytes' double quantization). ``tile``: number of rows that share a scale;
    values too small for it have errors of up to ``tile_floor`` of the tile's absmax. ``is_calibrated``: codes are known
    to be calibrated, so that errors beyond ``nearest`` are not damage.
    """

    block: int
    worst: float
    relative_rmse: float
    anchor: float = math.inf
    floor: float = 0.0
    weighted: float | None = None
    calibrated: float | None = None
    calibrated_rmse: float | None = None
    nearest: float = math.inf
    codes: int = 0
    nested: bool = False
    tile: int = 0
    tile_floor: float = 0.0
    is_calibrated: bool = False

    def for_rounding(self, rounding: Rounding) -> Bound:
        """The limits for codes that were chosen in this way."""
        if rounding == "nearest":
            return self
        bound, worst = self, self.weighted
        if rounding == "calibration":
            bound = replace(self, nearest=min(self.nearest, self.worst), is_calibrated=True)
            worst = self.calibrated if worst is None else CALIBRATED * worst
        if worst is None:
            return bound
        if rounding == "calibration" and self.calibrated_rmse is not None:
            return replace(bound, worst=worst, anchor=math.inf, relative_rmse=self.calibrated_rmse)
        rmse = min(WEIGHTED_RMSE * self.relative_rmse, WEIGHTED_RMSE_MAX)
        return replace(bound, worst=worst, anchor=math.inf, relative_rmse=rmse)

    def with_rounding(self, relative: float, step: float = 0.0) -> Bound:
        """The limits if scales and decoded values are rounded to a float type, with errors up to ``relative`` or
        ``step``."""
        return replace(
            self,
            worst=self.worst + 2 * relative,
            anchor=self.anchor + 2 * relative,
            nearest=self.nearest + 2 * relative,
            floor=self.floor + (self.codes + 1) * step,
        )


def _rounding(
    block: int, worst: float, rmse: float, *, codes: int, anchor: float = 0.0, weighted: float | None = None
) -> Bound:
    """A ggml type with one float16 scale, whose rounding adds ``_F16`` of the value, or ``codes`` steps below the
    normal range."""
    return Bound(block, worst + _F16, rmse, anchor + _F16, codes * _F16_STEP, weighted)


def _search(block: int, worst: float, rmse: float, *, codes: int, weighted: float) -> Bound:
    return Bound(block, worst, rmse, math.inf, codes * _F16_STEP, weighted)


BOUNDS: Mapping[str, Bound] = {
    # d = absmax / 127, to nearest: half a step.
    "q8_0": replace(_rounding(32, 1 / 254, 0.02, codes=127), calibrated=_EIGHT_BITS),
    # d = value of largest magnitude / -8; nearest of -8..7: half a step (1/16), but a whole step if a value of the
    # other sign is as large.
    "q4_0": _rounding(32, 1 / 8, 0.18, codes=8, weighted=0.60),
    "q5_0": _rounding(32, 1 / 16, 0.11, codes=16, weighted=0.60),
    # Range / 15 (31) steps from a float16 minimum: the range is at most twice absmax; both ends are stored exactly.
    "q4_1": _rounding(32, 1 / 15 + 2 * _F16, 0.16, codes=16, anchor=2 * _F16, weighted=0.80),
    "q5_1": _rounding(32, 1 / 31 + 2 * _F16, 0.10, codes=32, anchor=2 * _F16, weighted=0.75),
    # Ternary: d = absmax, nearest of -1, 0, 1.
    "tq1_0": replace(_rounding(256, 1 / 2, 0.95, codes=1), calibrated=3.0),
    "tq2_0": replace(_rounding(256, 1 / 2, 0.95, codes=1), calibrated=3.0),
    # Power-of-two scale that puts absmax in [4, 8) over codes that end at 6, with steps of 2 above 4.
    "mxfp4": Bound(32, 1 / 4, 0.28, 1 / 4, calibrated=2.0),
    # Floats of 4 bits with a scale of absmax / 6 in float8: a sixteenth above or below, and a smallest step of 2^-9.
    "nvfp4": Bound(16, 17 / 96 + 1e-5, 0.30, floor=6 * 2.0**-10, calibrated=2.0),
    # Signs, times the mean magnitude.
    # Calibrated, values may be as far from their own as they are large, and take over the errors of others.
    "q1_0": replace(_rounding(128, 1.0, 0.95, codes=1, anchor=math.inf), calibrated=math.inf, calibrated_rmse=2.0),
    # -1, 0, 1 and 2 times absmax, with blocks of 64.
    "q2_0": replace(_rounding(64, 1 / 2, 0.95, codes=2), calibrated=math.inf, calibrated_rmse=1.3),
    "q2_k": _search(256, 0.65, 0.50, codes=60, weighted=1.30),
    "q3_k": _search(256, 0.33, 0.26, codes=128, weighted=0.75),
    "q4_k": _search(256, 0.20, 0.20, codes=1008, weighted=1.00),
    "q5_k": _search(256, 0.11, 0.11, codes=2016, weighted=0.50),
    "q6_k": _search(256, 0.05, 0.05, codes=4096, weighted=0.60),
    "iq4_nl": _search(32, 0.20, 0.18, codes=127, weighted=1.20),
    "iq4_xs": _search(256, 0.20, 0.16, codes=4064, weighted=1.00),
    "iq3_s": _search(256, 1.00, 0.50, codes=465, weighted=1.50),
    "iq3_xxs": _search(256, 1.50, 0.60, codes=480, weighted=1.80),
    "iq2_s": _search(256, 0.85, 0.90, codes=170, weighted=math.inf),
    "iq2_xs": _search(256, math.inf, 0.90, codes=170, weighted=math.inf),
    "iq2_xxs": _search(256, math.inf, 0.95, codes=170, weighted=math.inf),
    "iq1_s": _search(256, math.inf, 0.95, codes=17, weighted=math.inf),
    "iq1_m": _search(256, math.inf, 0.95, codes=17, weighted=math.inf),
    # bitsandbytes: nearest of sixteen values times a float32 absmax; +-absmax are codes of their own. It multiplies by
    # 1 / absmax, which is infinite below 2^-128.
    "nf4": Bound(BLOCKSIZE, _NF4 + 1e-6, 0.16, 1e-6, floor=_SMALLEST, calibrated=1.3, calibrated_rmse=0.28),
    "fp4": Bound(BLOCKSIZE, _FP4 + 1e-6, 0.25, 1e-6, floor=_SMALLEST, calibrated=1.5, calibrated_rmse=0.38),
    "nf4-dq": Bound(
        BLOCKSIZE, _NF4 + 1e-6, 0.16, 1e-6, floor=_SMALLEST, nested=True, calibrated=1.3, calibrated_rmse=0.28
    ),
    "fp4-dq": Bound(
        BLOCKSIZE, _FP4 + 1e-6, 0.25, 1e-6, floor=_SMALLEST, nested=True, calibrated=1.5, calibrated_rmse=0.38
    ),
    # LLM.int8(): cast to float16 first, the row's absmax too, then the row's absmax / 127, nearest.
    "int8": Bound(
        0, 1 / 254 + _F16, 0.05, _F16 + 1e-6, (1 + 1 / 254) * _F16_STEP, calibrated=_EIGHT_BITS, calibrated_rmse=0.05
    ),
    # Keras: value * (127 / (absmax + 1e-7)), both rounded to the model's type; in bfloat16 a code may be off by one.
    "keras-int8": Bound(0, 1 / 127 + 2.0**-8, 0.05, floor=1e-7),
    # Keras: a scale for a column, or for 128 rows of it, of a kernel that it reshapes first: several outputs of
    # queries, keys and values share scales, so that one of small values loses more than
    # its own largest value tells.
    "keras-int4": Bound(0, 1.0, 0.5, floor=1e-7),
    # Serving libraries. A block is a group of the size that the user chose. ``worst`` is for calibrated codes (and
    # clipped ranges): GPTQ's compensate for the errors of earlier columns, by up to 8 steps of absmax / 7.5
    # seen with few inputs. ``nearest`` follows from the definition. compressed-tensors divides by a bfloat16 scale in
    # bfloat16, which has 8 bits: up to a step and a half of absmax / 127.5 (8 bits); half a step of absmax / 7.5, or of
    # range / 15 with its zero point, plus that rounding (4 bits).
    "w8a8-int8": Bound(0, _EIGHT_BITS, 0.05, nearest=1.5 / 127.5, codes=128),
    "w8a16": Bound(0, _EIGHT_BITS, 0.05, nearest=1.5 / 127.5, codes=128),
    "w4a16": Bound(0, 2.0, 0.35, nearest=1 / 15 + 2.0**-8, codes=8),
    "w4afp8": Bound(0, 2.0, 0.35, nearest=1 / 15 + 2.0**-8, codes=8),
    "w4a16-asym": Bound(0, 2.0, 0.35, nearest=1.2 / 15 + 2.0**-7, codes=15),
    # float8 e4m3 with a scale of absmax / 448: 3 bits of mantissa, a smallest step of 2^-9, and a scale of the model's
    # type, one for a row or for 128 by 128 values.
    "fp8-dynamic": Bound(0, 2.0**-4 + 2.0**-8, 0.05, calibrated=0.45, calibrated_rmse=0.1, codes=448),
    "fp8-block": Bound(
        0,
        2.0**-4 + 2.0**-8,
        0.05,
        calibrated=0.45,
        calibrated_rmse=0.1,
        codes=448,
        tile=128,
        tile_floor=1.01 * 2.0**-10 / 448,
    ),
    # The same float4 and float8 codes with scales of one byte. Of nvfp4, a scale of absmax / 6 rounded to bfloat16 and
    # then to float8. A power of two that is rounded up from 1.75 on leaves a largest code of 3.5 to 7 (224 to 448), and
    # 5 is as far from 4 as from 6.
    "nvfp4a16": Bound(16, 17 / 96 + 2.0**-7, 0.30, floor=1e-6, calibrated=2.0, calibrated_rmse=0.40),
    "mxfp4a16": Bound(32, 1 / 5 + 1e-5, 0.30, floor=_SMALLEST, calibrated=2.0, calibrated_rmse=0.40),
    "mxfp8a16": Bound(32, 2.0**-4 + 1e-5, 0.05, floor=_SMALLEST, calibrated=0.5, calibrated_rmse=0.1),
    "torchao-fp8": Bound(0, 2.0**-4 + 2.0**-8, 0.05, calibrated=0.45, calibrated_rmse=0.1, codes=448),
    # Half a step of range / 15 (int4), of which the scale and the zero point are rounded to the model's type, or of
    # absmax / 7.5, in the model's type (int8-int4). Smallest: a range of 1e-6, a scale of float16's normal range.
    "torchao-int4": Bound(0, 2.0, 0.35, floor=1e-6, nearest=1 / 15 + 2.0**-7, codes=16),
    "torchao-int8-int4": Bound(0, 2.0, 0.35, floor=2.0**-15, nearest=1 / 15 + 2.0**-7, codes=8),
    # torchao's scales are at least float32's epsilon, 2^-23.
    "torchao-int8": Bound(
        0, 1.5 / 127.5, 0.05, floor=2.0**-24, calibrated=_EIGHT_BITS, calibrated_rmse=0.05, codes=128
    ),
    # Steps of range / (2**bits - 1) from a stored bias, both in the model's type: a step, plus bfloat16's rounding of
    # both ends. A step is at least 1e-7.
    "mlx-2": Bound(0, 2 / 3 + 2.0**-7, 0.90, floor=1e-7, calibrated=5.0, calibrated_rmse=0.9, codes=4),
    "mlx-3": Bound(0, 2 / 7 + 2.0**-7, 0.55, floor=1e-7, calibrated=24 / 7, calibrated_rmse=0.55, codes=8),
    "mlx-4": Bound(0, 2 / 15 + 2.0**-7, 0.35, floor=1e-7, calibrated=24 / 15, calibrated_rmse=0.35, codes=16),
    "mlx-5": Bound(0, 2 / 31 + 2.0**-7, 0.18, floor=1e-7, calibrated=24 / 31, calibrated_rmse=0.18, codes=32),
    "mlx-6": Bound(0, 2 / 63 + 2.0**-7, 0.09, floor=1e-7, calibrated=24 / 63, calibrated_rmse=0.09, codes=64),
    "mlx-8": Bound(0, 2 / 255 + 2.0**-7, 0.05, floor=1e-7, calibrated=_EIGHT_BITS, calibrated_rmse=0.05, codes=256),
    # MLX rounds a scale of absmax / 6 (448) up to a power of two. The limits also allow the nearest, up to a factor of
    # sqrt(2) below, which cuts off the largest values. Scales are of the type of the weights, as small as float16's.
    "mlx-mxfp4": Bound(32, 1 - 2.0**-0.5 + 1e-5, 0.30, floor=6 * _F16_STEP, calibrated=2.0, calibrated_rmse=0.40),
    "mlx-mxfp8": Bound(32, 1 - 2.0**-0.5 + 1e-5, 0.30, floor=448 * _F16_STEP, calibrated=0.5, calibrated_rmse=0.30),
    # A scale of absmax / 6 in float8 e4m3: a sixteenth above or below, and a smallest step of 2^-9.
    "mlx-nvfp4": Bound(16, 17 / 96 + 1e-5, 0.30, floor=6 * 2.0**-10, calibrated=2.0, calibrated_rmse=0.40),
    # Half a step of range / 15 (255), where the range is at most twice absmax; the scale is rounded to float16, and
    # that error is multiplied by the code. AWQ's smallest range is 1e-5.
    "awq-4": Bound(0, 0.6, 0.35, floor=1e-5, calibrated=2.0, calibrated_rmse=0.35, nearest=1 / 15 + 3 * _F16),
    "gptq-4": Bound(0, 2.0, 0.35, floor=15 * _F16_STEP, nearest=1 / 15 + 3 * _F16),
    "gptq-8": Bound(0, _EIGHT_BITS, 0.05, floor=255 * _F16_STEP, nearest=1 / 255 + 3 * _F16),
    # gemma.cpp's 8-bit floats: 3 bits of mantissa (2 for small values), truncated to 4 before rounding; the smallest is
    # 2^-23.
    "sfp": Bound(0, 2.0**-3, 0.06, floor=2.0**-23),
}
"""Stored type -> its limits.

Sources: ggml's quantize_row_*_ref, bitsandbytes' functional.py, and the observed output of each library's own
quantizer.
"""
