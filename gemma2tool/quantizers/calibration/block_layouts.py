"""Where GGUF's block types keep codes, scales and minima: blocks taken apart, and put together with other codes and
scales.

Blocks are uint8 (n, block bytes). A value is ``scale * level + offset``; ``width`` consecutive columns share scale and
offset. Layouts are those of ggml-common.h. The types whose codes are vectors of columns (IQ1, IQ2, IQ3) are not here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from gemma2tool.model.lazy import Array
from gemma2tool.quantizers.float_codes import FLOAT8

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FLOAT4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@dataclass(frozen=True)
class Fields:
    """Scales and minima of n blocks as stored: ``super_scale`` and ``super_minimum`` float32 (n,), or None;
    ``scales`` and ``minima`` (n, groups): integers under a super-block's scale, float32 otherwise, None if the type has
    none.
    """

    super_scale: Array | None
    super_minimum: Array | None
    scales: Array
    minima: Array | None


@dataclass(frozen=True)
class Layout:
    """A block type whose codes are scalars.

    ``columns``: values of a block; ``width``: of a group. ``levels``: float32, by stored code. ``scale_range`` and
    ``minimum_range``: smallest and largest stored integer; None for float16. ``read``: the fields of blocks.
    ``write``: puts codes (n, columns) and fields into blocks, in place. ``sign``: of the minimum in a value's offset.
    ``scale_values``: what stored integers stand for, if not for themselves.
    """

    columns: int
    width: int
    levels: tuple[int, ...]
    read: Callable[[Array], Fields]
    write: Callable[[Array, Array, Fields], None]
    scale_range: tuple[int, int] | None = None
    minimum_range: tuple[int, int] | None = None
    sign: int = 1
    scale_values: Array | None = None

    @property
    def groups(self) -> int:
        return self.columns // self.width

    @functools.cached_property
    def ascending(self) -> tuple[Array, Array]:
        """The stored codes (uint8) in the order of their levels, and the levels, float32."""
        levels = np.array(self.levels, np.float32)
        order = np.argsort(levels, kind="stable")
        return order.astype(np.uint8), levels[order]


def f16(blocks: Array, at: int) -> Array:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)[:, 0].astype(np.float32)


def put_f16(blocks: Array, at: int, values: Array) -> None:
    blocks[:, at : at + 2] = values.astype(np.float16).view(np.uint8).reshape(-1, 2)


def _halves(codes: Array, half: int) -> Array:
    """Two codes of four bits a byte: of 2 * ``half`` values, the first half in the low bits."""
    pairs = codes.reshape(len(codes), -1, 2, half)
    packed: Array = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(codes), -1)
    return packed


def _quarters(codes: Array) -> Array:
    """Four codes of two bits a byte: 128 values in 32 bytes, the first 32 in the lowest bits."""
    parts = codes.reshape(len(codes), -1, 4, 32)
    packed: Array = (parts[:, :, 0] | parts[:, :, 1] << 2 | parts[:, :, 2] << 4 | parts[:, :, 3] << 6).reshape(
        len(codes), -1
    )
    return packed


# Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL: a float16 scale, and a float16 minimum in the second pair of bytes.


def _read_plain(blocks: Array) -> Fields:
    return Fields(None, None, f16(blocks, 0)[:, None], None)


def _read_with_minimum(blocks: Array) -> Fields:
    return Fields(None, None, f16(blocks, 0)[:, None], f16(blocks, 2)[:, None])


def _put_plain(blocks: Array, fields: Fields) -> int:
    """Writes scale and minimum; returns where the codes begin."""
    put_f16(blocks, 0, fields.scales[:, 0])
    if fields.minima is None:
        return 2
    put_f16(blocks, 2, fields.minima[:, 0])
    return 4


def _write_nibbles(blocks: Array, codes: Array, fields: Fields) -> None:
    blocks[:, _put_plain(blocks, fields) :] = _halves(codes, 16)


def _write_five_bits(blocks: Array, codes: Array, fields: Fields) -> None:
    start = _put_plain(blocks, fields)
    blocks[:, start : start + 4] = np.packbits(codes >> 4, axis=1, bitorder="little")
    blocks[:, start + 4 :] = _halves(codes & 15, 16)


def _write_bytes(blocks: Array, codes: Array, fields: Fields) -> None:
    blocks[:, _put_plain(blocks, fields) :] = codes


# Q4_K and Q5_K: d, dmin, eight scales and minima of six bits in twelve bytes; then the fifth bits of Q5_K, and nibbles.


def _read_six_bit_pairs(blocks: Array) -> Fields:
    packed = blocks[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return Fields(f16(blocks, 0), f16(blocks, 2), scales, minima)


def _put_six_bit_pairs(blocks: Array, fields: Fields) -> None:
    assert fields.super_scale is not None and fields.super_minimum is not None and fields.minima is not None
    put_f16(blocks, 0, fields.super_scale)
    put_f16(blocks, 2, fields.super_minimum)
    scales, minima = fields.scales.astype(np.uint8), fields.minima.astype(np.uint8)
    blocks[:, 4:8] = scales[:, :4] | scales[:, 4:] >> 4 << 6
    blocks[:, 8:12] = minima[:, :4] | minima[:, 4:] >> 4 << 6
    blocks[:, 12:16] = scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4


def _write_q4_k(blocks: Array, codes: Array, fields: Fields) -> None:
    _put_six_bit_pairs(blocks, fields)
    blocks[:, 16:] = _halves(codes, 32)


def _write_q5_k(blocks: Array, codes: Array, fields: Fields) -> None:
    _put_six_bit_pairs(blocks, fields)
    high = (codes >> 4).reshape(-1, 8, 32)
    blocks[:, 16:48] = np.packbits(high, axis=1, bitorder="little")[:, 0]
    blocks[:, 48:] = _halves(codes & 15, 32)


# Q2_K: sixteen bytes of a scale and a minimum of four bits, codes, d, dmin.


def _read_q2_k(blocks: Array) -> Fields:
    return Fields(f16(blocks, 80), f16(blocks, 82), blocks[:, :16] & 15, blocks[:, :16] >> 4)


def _write_q2_k(blocks: Array, codes: Array, fields: Fields) -> None:
    assert fields.super_scale is not None and fields.super_minimum is not None and fields.minima is not None
    blocks[:, :16] = fields.scales.astype(np.uint8) | fields.minima.astype(np.uint8) << 4
    blocks[:, 16:80] = _quarters(codes)
    put_f16(blocks, 80, fields.super_scale)
    put_f16(blocks, 82, fields.super_minimum)


# Q3_K: the third bits, two-bit codes, sixteen scales of six bits (plus 32) in twelve bytes, d.


def _read_q3_k(blocks: Array) -> Fields:
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([packed[:, 8:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    return Fields(f16(blocks, 108), None, (low | high << 4).astype(np.int16) - 32, None)


def _write_q3_k(blocks: Array, codes: Array, fields: Fields) -> None:
    assert fields.super_scale is not None
    blocks[:, :32] = np.packbits((codes >> 2).reshape(-1, 8, 32), axis=1, bitorder="little")[:, 0]
    blocks[:, 32:96] = _quarters(codes & 3)
    scales = (fields.scales + 32).astype(np.uint8)
    blocks[:, 96:104] = scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4
    high = (scales >> 4).reshape(-1, 4, 4)
    blocks[:, 104:108] = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    put_f16(blocks, 108, fields.super_scale)


# Q6_K: low nibbles, high pairs of bits, sixteen signed bytes of scales, d.


def _read_q6_k(blocks: Array) -> Fields:
    return Fields(f16(blocks, 208), None, np.ascontiguousarray(blocks[:, 192:208]).view(np.int8), None)


def _write_q6_k(blocks: Array, codes: Array, fields: Fields) -> None:
    assert fields.super_scale is not None
    parts = codes.reshape(-1, 2, 4, 32)
    blocks[:, :128] = (parts[:, :, :2] & 15 | (parts[:, :, 2:] & 15) << 4).reshape(-1, 128)
    blocks[:, 128:192] = _quarters(codes >> 4)
    blocks[:, 192:208] = fields.scales.astype(np.int8).view(np.uint8)
    put_f16(blocks, 208, fields.super_scale)


# IQ4_XS: d, the high bits of eight scales of six bits (plus 32), their low nibbles, codes.


def _read_iq4_xs(blocks: Array) -> Fields:
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    bits = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16)
    high = (bits >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8)
    return Fields(f16(blocks, 0), None, (low | high << 4).astype(np.int16) - 32, None)


def _write_iq4_xs(blocks: Array, codes: Array, fields: Fields) -> None:
    assert fields.super_scale is not None
    put_f16(blocks, 0, fields.super_scale)
    scales = (fields.scales + 32).astype(np.uint16)
    high = np.bitwise_or.reduce(scales >> 4 << np.arange(0, 16, 2, dtype=np.uint16), axis=1)
    blocks[:, 2:4] = high.astype("<u2").view(np.uint8).reshape(-1, 2)
    low = (scales & 15).astype(np.uint8)
    blocks[:, 4:8] = low[:, ::2] | low[:, 1::2] << 4
    blocks[:, 8:] = _halves(codes, 16)


# TQ1_0: five ternary digits a byte, four in the last four bytes, d. TQ2_0: codes of two bits, d.


def _read_last_scale(blocks: Array) -> Fields:
    return Fields(None, None, f16(blocks, blocks.shape[1] - 2)[:, None], None)


def _write_tq1_0(blocks: Array, codes: Array, fields: Fields) -> None:
    start = 0
    for first, count, digits in ((0, 32, 5), (160, 16, 5), (240, 4, 4)):
        number = np.zeros((len(codes), count), np.uint16)
        for digit in codes[:, first : first + count * digits].reshape(len(codes), digits, count).swapaxes(0, 1):
            number = number * 3 + digit
        number = number * 3 if digits == 4 else number
        blocks[:, start : start + count] = (number * 256 + 242) // 243
        start += count
    put_f16(blocks, 52, fields.scales[:, 0])


def _write_tq2_0(blocks: Array, codes: Array, fields: Fields) -> None:
    blocks[:, :64] = _quarters(codes)
    put_f16(blocks, 64, fields.scales[:, 0])


# Q1_0 and Q2_0: d, codes of one or two bits in the order of the columns.


def _write_q1_0(blocks: Array, codes: Array, fields: Fields) -> None:
    blocks[:, _put_plain(blocks, fields) :] = np.packbits(codes, axis=1, bitorder="little")


def _write_q2_0(blocks: Array, codes: Array, fields: Fields) -> None:
    fours = codes.reshape(len(codes), -1, 4)
    packed = np.bitwise_or.reduce(fours << np.array([0, 2, 4, 6], np.uint8), axis=2)
    blocks[:, _put_plain(blocks, fields) :] = packed


# MXFP4: an exponent, codes. A level is twice the float4 value, so that the scale is 2^(e - 128).


def _read_mxfp4(blocks: Array) -> Fields:
    return Fields(None, None, blocks[:, :1].astype(np.int16), None)


def _write_mxfp4(blocks: Array, codes: Array, fields: Fields) -> None:
    blocks[:, 0] = fields.scales[:, 0].astype(np.uint8)
    blocks[:, 1:] = _halves(codes, 16)


# NVFP4: four float8 scales, codes. A level is twice the float4 value, so that the scale is half of the float8.


def _read_nvfp4(blocks: Array) -> Fields:
    return Fields(None, None, blocks[:, :4].astype(np.int16), None)


def _write_nvfp4(blocks: Array, codes: Array, fields: Fields) -> None:
    blocks[:, :4] = fields.scales.astype(np.uint8)
    blocks[:, 4:] = _halves(codes, 8)


_HALF_POWERS = np.ldexp(np.float32(1), np.arange(255) - 128)
_HALF_FLOAT8 = FLOAT8[:127] / 2
SIX_BITS, SIGNED_SIX_BITS = (0, 63), (-32, 31)

LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "Q4_0": Layout(32, 32, tuple(range(-8, 8)), _read_plain, _write_nibbles),
        "Q4_1": Layout(32, 32, tuple(range(16)), _read_with_minimum, _write_nibbles),
        "Q5_0": Layout(32, 32, tuple(range(-16, 16)), _read_plain, _write_five_bits),
        "Q5_1": Layout(32, 32, tuple(range(32)), _read_with_minimum, _write_five_bits),
        "Q8_0": Layout(32, 32, (*range(128), *range(-128, 0)), _read_plain, _write_bytes),
        "IQ4_NL": Layout(32, 32, IQ4_LEVELS, _read_plain, _write_nibbles),
        "Q2_K": Layout(256, 16, (0, 1, 2, 3), _read_q2_k, _write_q2_k, (0, 15), (0, 15), -1),
        "Q3_K": Layout(256, 16, tuple(range(-4, 4)), _read_q3_k, _write_q3_k, SIGNED_SIX_BITS),
        "Q4_K": Layout(256, 32, tuple(range(16)), _read_six_bit_pairs, _write_q4_k, SIX_BITS, SIX_BITS, -1),
        "Q5_K": Layout(256, 32, tuple(range(32)), _read_six_bit_pairs, _write_q5_k, SIX_BITS, SIX_BITS, -1),
        "Q6_K": Layout(256, 16, tuple(range(-32, 32)), _read_q6_k, _write_q6_k, (-128, 127)),
        "IQ4_XS": Layout(256, 32, IQ4_LEVELS, _read_iq4_xs, _write_iq4_xs, SIGNED_SIX_BITS),
        "TQ1_0": Layout(256, 256, (-1, 0, 1), _read_last_scale, _write_tq1_0),
        "TQ2_0": Layout(256, 256, (-1, 0, 1), _read_last_scale, _write_tq2_0),
        "Q1_0": Layout(128, 128, (-1, 1), _read_plain, _write_q1_0),
        "Q2_0": Layout(64, 64, (-1, 0, 1, 2), _read_plain, _write_q2_0),
        "MXFP4": Layout(32, 32, FLOAT4_LEVELS, _read_mxfp4, _write_mxfp4, (0, 254), scale_values=_HALF_POWERS),
        "NVFP4": Layout(64, 16, FLOAT4_LEVELS, _read_nvfp4, _write_nvfp4, (0, 126), scale_values=_HALF_FLOAT8),
    }
)
"""The types whose codes are scalars."""


def scales_and_offsets(layout: Layout, fields: Fields) -> tuple[Array, Array | None]:
    """The scale and offset of each group, float32, from fields of n blocks (any trailing axes), rounded as ggml's
    dequantization rounds them.
    """
    if layout.scale_values is not None:
        return layout.scale_values[fields.scales], None
    scales, minima = fields.scales.astype(np.float32), fields.minima
    if fields.super_scale is not None:
        scales = scales * fields.super_scale.reshape(-1, *[1] * (scales.ndim - 1))
    if minima is None:
        return scales, None
    offsets = minima.astype(np.float32)
    if fields.super_minimum is not None:
        offsets = offsets * fields.super_minimum.reshape(-1, *[1] * (offsets.ndim - 1))
    return scales, layout.sign * offsets
