"""gemma.cpp's 8-bit "switching floating point" (SFP), and the 4-bit clusters (NUQ) whose centers are SFP codes.

A code has a sign, an exponent, and three mantissa bits for magnitudes from 2^-7 on, two below; 0x80 is not used. The
largest magnitude is 1.875; a tensor with larger values is stored divided by a scale. Source: gemma.cpp
``compression/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from gemma2tool.model.lazy import FLOAT32, Array, to_float32
from gemma2tool.quantizers.base import Part

MAX = 1.875
GROUP, CLUSTERS = 256, 16


@lru_cache(maxsize=1)
def decoding() -> Array:
    """The value of every code, float32 (256,)."""
    codes = np.arange(128)
    large = codes >= 64
    bits = np.where(large, 3, 2)
    exponent = (codes >> bits) - np.where(large, 15, 23)
    values = (1 + (codes & ((1 << bits) - 1)) / (1 << bits)) * 2.0**exponent
    values[0] = 0
    return np.concatenate([values, -values]).astype(np.float32)


@lru_cache(maxsize=1)
def encoding() -> Array:
    """The code of every bfloat16, indexed by its bits, uint8 (65536,): that of ``SfpCodec::EncBytes``. Magnitudes above
    1.875 saturate.

    The last mantissa bit is truncated, the rest rounded to nearest even. Magnitudes from 1.111b * 2^-8 on round to
    2^-7; those that round to 2^-23 become 1.01b * 2^-23, because the code of 2^-23 is that of zero.
    """
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    magnitude = np.minimum(bits & 0x7FFE0000, np.float32(MAX).view(np.uint32))
    large_before = magnitude >= np.float32(0.007568359375).view(np.uint32)
    shift = np.where(large_before, 20, 21).astype(np.uint32)
    rounded = magnitude + ((magnitude >> shift) & 1) + (np.uint32(1) << (shift - 1)) - 1
    large = magnitude >= np.float32(0.00732421875).view(np.uint32)
    mantissa = (rounded & 0x7FFFFF) >> np.where(large, 20, 21).astype(np.uint32)
    exponent = (rounded >> 23).astype(np.int64) - 127
    mantissa = np.where((exponent == -23) & (mantissa == 0), 1, mantissa)
    code = (exponent + np.where(large, 15, 23)) << np.where(large, 3, 2) | mantissa
    code = np.where(exponent < -23, 0, code | (bits >> 24 & 0x80))
    return code.astype(np.uint8)


def encode(values: Array, scale: float) -> Array:
    """Codes, uint8, of values divided by ``scale``. Float32 is truncated to bfloat16 first, as in gemma.cpp."""
    wide = to_float32(values)
    if scale != 1:
        wide = np.clip(wide * np.float32(1 / np.float64(scale)), -MAX, MAX)
    codes: Array = encoding()[np.ascontiguousarray(wide, FLOAT32).view(np.uint32) >> 16]
    return codes


def scale_for(largest: float) -> float:
    """The scale of a tensor with this largest magnitude: 1 if it can be represented (gemma.cpp's ``ScaleWeights``)."""
    return 1.0 if largest <= MAX else float(np.float32(np.float32(largest) / np.float32(MAX)))


@dataclass(frozen=True)
class Sfp:
    """Encodes rows as the SFP codes of values divided by ``scale``."""

    scale: float = 1.0

    name: ClassVar[str] = "sfp"
    lossless: ClassVar[bool] = False
    collects: ClassVar[tuple[str, ...]] = ()

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        return (Part("", "U8", shape, int(np.prod(shape, dtype=np.int64))),)

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        return 1

    def encode(self, rows: Array) -> Mapping[str, Array]:
        return {"": encode(rows, self.scale)}

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        return {}


def nuq_bytes(values: int) -> int:
    """Bytes of a NUQ stream: sixteen centers for each group of 256 values, then half a byte for each value."""
    return CLUSTERS * -(-values // GROUP) + -(-values // 2)


def nuq_decode(centers: Array, nibbles: Array) -> Array:
    """Values (G, 256) of a NUQ stream: ``centers`` (G, 16) are SFP codes; ``nibbles`` (G, 128) are indices, the low
    half of a byte first."""
    indices = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(len(nibbles), GROUP)
    return np.take_along_axis(decoding()[centers], indices.astype(np.intp), axis=1)
