"""Where the GGUF block types IQ2 and IQ3 keep the numbers of their entries, signs and scales.

A vector of 8 or 4 columns is scale * sign * entry, with an entry from a table and a sign for each column. Layouts are
those of ggml-common.h; the tables are the gguf package's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import numpy as np

from gemma2tool.model.lazy import Array
from gemma2tool.quantizers.calibration.block_layouts import put_f16

COLUMNS = 256
"""Values of a block."""


@dataclass(frozen=True)
class VectorFields:
    """What n blocks hold: ``super_scale`` float32 (n,), ``scales`` (n, groups) of four bits, ``codes`` (n, vectors),
    and ``signs`` uint8 (n, 32), a bit for each column.
    """

    super_scale: Array
    scales: Array
    codes: Array
    signs: Array


@dataclass(frozen=True)
class VectorLayout:
    """A block type whose codes are vectors.

    ``size``: columns of a vector, ``width``: of a group. ``even_signs``: the eighth sign of every eight columns follows
    from the other seven. ``scale``: (a, b), where a group's scale is super_scale * (a * stored + b). ``read_scales``:
    the stored scales of blocks. ``write``: puts fields into blocks, in place.
    """

    size: int
    width: int
    even_signs: bool
    scale: tuple[float, float]
    read_scales: Callable[[Array], Array]
    write: Callable[[Array, VectorFields], None]

    @property
    def groups(self) -> int:
        return COLUMNS // self.width

    def scales(self, super_scale: Array, stored: Array) -> Array:
        """The scales, float32, of stored ones (n, ...)."""
        factor, offset = self.scale
        known = super_scale.reshape(-1, *[1] * (stored.ndim - 1))
        scales: Array = known * (np.float32(factor) * stored.astype(np.float32) + np.float32(offset))
        return scales


@cache
def entries_of(type: str) -> Array:
    """The table of a type, float32 (entries, size)."""
    from gguf import quants

    quantization = getattr(quants, type)
    quantization.init_grid()
    assert quantization.grid is not None
    table: Array = np.ascontiguousarray(quantization.grid.reshape(quantization.grid_shape), np.float32)
    return table


def _nibbles(blocks: Array, at: int) -> Array:
    packed = blocks[:, at:]
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(blocks), -1)


def _put_nibbles(blocks: Array, at: int, scales: Array) -> None:
    values = scales.astype(np.uint8)
    blocks[:, at:] = values[:, ::2] | values[:, 1::2] << 4


def _words(blocks: Array, at: int) -> Array:
    return np.ascontiguousarray(blocks[:, at:]).view("<u4")


def _signs_and_scales(fields: VectorFields) -> Array:
    """Four times seven signs, and a scale in the upper four bits: uint32 (n, 8)."""
    signs = (fields.signs & 127).reshape(-1, 8, 4).astype(np.uint32)
    shifted = signs << np.array([0, 7, 14, 21], np.uint32)
    words: Array = np.bitwise_or.reduce(shifted, axis=2) | fields.scales.astype(np.uint32) << 28
    return words


def _read_iq2_xxs(blocks: Array) -> Array:
    return _words(blocks, 2)[:, 1::2] >> 28


def _write_iq2_xxs(blocks: Array, fields: VectorFields) -> None:
    put_f16(blocks, 0, fields.super_scale)
    groups = blocks[:, 2:].reshape(-1, 8, 8)
    groups[:, :, :4] = fields.codes.reshape(-1, 8, 4)
    groups[:, :, 4:] = np.ascontiguousarray(_signs_and_scales(fields)).view(np.uint8).reshape(-1, 8, 4)
    blocks[:, 2:] = groups.reshape(len(blocks), -1)


def _read_iq2_xs(blocks: Array) -> Array:
    return _nibbles(blocks, 66)


def _write_iq2_xs(blocks: Array, fields: VectorFields) -> None:
    put_f16(blocks, 0, fields.super_scale)
    words = fields.codes.astype("<u2") | (fields.signs & 127).astype("<u2") << 9
    blocks[:, 2:66] = words.view(np.uint8)
    _put_nibbles(blocks, 66, fields.scales)


def _read_iq2_s(blocks: Array) -> Array:
    return _nibbles(blocks, 74)


def _write_iq2_s(blocks: Array, fields: VectorFields) -> None:
    put_f16(blocks, 0, fields.super_scale)
    blocks[:, 2:34] = fields.codes & 255
    blocks[:, 34:66] = fields.signs
    high = (fields.codes >> 8).astype(np.uint8).reshape(-1, 8, 4)
    blocks[:, 66:74] = np.bitwise_or.reduce(high << np.array([0, 2, 4, 6], np.uint8), axis=2)
    _put_nibbles(blocks, 74, fields.scales)


def _read_iq3_xxs(blocks: Array) -> Array:
    return _words(blocks, 66) >> 28


def _write_iq3_xxs(blocks: Array, fields: VectorFields) -> None:
    put_f16(blocks, 0, fields.super_scale)
    blocks[:, 2:66] = fields.codes
    blocks[:, 66:] = np.ascontiguousarray(_signs_and_scales(fields)).view(np.uint8).reshape(len(blocks), -1)


def _read_iq3_s(blocks: Array) -> Array:
    return _nibbles(blocks, 106)


def _write_iq3_s(blocks: Array, fields: VectorFields) -> None:
    put_f16(blocks, 0, fields.super_scale)
    blocks[:, 2:66] = fields.codes & 255
    blocks[:, 66:74] = np.packbits((fields.codes >> 8).astype(np.uint8), axis=1, bitorder="little")
    blocks[:, 74:106] = fields.signs
    _put_nibbles(blocks, 106, fields.scales)


VECTOR_LAYOUTS: Mapping[str, VectorLayout] = MappingProxyType(
    {
        "IQ2_XXS": VectorLayout(8, 32, True, (0.25, 0.125), _read_iq2_xxs, _write_iq2_xxs),
        "IQ2_XS": VectorLayout(8, 16, True, (0.25, 0.125), _read_iq2_xs, _write_iq2_xs),
        "IQ2_S": VectorLayout(8, 16, False, (0.25, 0.125), _read_iq2_s, _write_iq2_s),
        "IQ3_XXS": VectorLayout(4, 32, True, (0.5, 0.25), _read_iq3_xxs, _write_iq3_xxs),
        "IQ3_S": VectorLayout(4, 32, False, (2.0, 1.0), _read_iq3_s, _write_iq3_s),
    }
)
"""The types whose codes are vectors, without IQ1."""
