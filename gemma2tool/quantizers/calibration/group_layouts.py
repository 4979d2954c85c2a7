"""Types whose values are a scale times a level, plus an offset in some: what can be chosen freely in them, and how an
encoder stores the choice.

The scale belongs to a group of columns, to a row, or to a tile of rows and columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gemma2tool.model.lazy import FLOAT16, FLOAT32, Array, DType, to_float32
from gemma2tool.quantizers import awq, compressed, gptq, mlx, torchao
from gemma2tool.quantizers.awq import Awq
from gemma2tool.quantizers.base import Encoder
from gemma2tool.quantizers.bnb import FourBit, Int8, NestedScales
from gemma2tool.quantizers.bnb_tables import ASCENDING, BLOCKSIZE, CODES
from gemma2tool.quantizers.casts import cast
from gemma2tool.quantizers.compressed import Compressed
from gemma2tool.quantizers.compressed_floats import CompressedFloats, group_scales
from gemma2tool.quantizers.float_codes import FLOAT4, FP8, FP8_MAX
from gemma2tool.quantizers.gptq import Gptq
from gemma2tool.quantizers.groups import group_ranges

Start = Callable[[Array, Array], tuple[Array, Array | None]]
"""Scales and offsets (None if the type has none) by the type's own rule, from the smallest and largest values."""


@dataclass
class GroupCodes:
    """Rounded rows: ``codes`` uint8 (n, I), indices of levels; ``scales`` and ``offsets`` float32 (n, G), as the type
    stores them. ``nested``: the scales, if they are quantized themselves.
    """

    codes: Array
    scales: Array
    offsets: Array | None
    nested: NestedScales | None = None


@dataclass(frozen=True)
class GroupLayout:
    """A value is scale * level + offset, or, with zero points, scale * (level + offset).

    ``levels``: float32, ascending. ``width``: columns that share scale and offset; the last group of a row may be
    narrower. ``tile``: rows that share them. ``scale_dtype``: of stored scales and biases. ``zeros``: the smallest and
    the largest offset, if offsets are whole numbers. ``dtype``: of the values that a reader computes, rounded after
    each operation. ``codes``: the stored code of each level, or ``first_code``: of the first, if they are consecutive.
    ``nested_offset``: of scales that are themselves quantized (see ``bnb.FourBit``). ``nearest_scales``: rounds float32
    scales to those that can be stored, which are then kept as float32; None: they are stored in ``scale_dtype``.
    """

    levels: Array
    width: int
    start: Start
    scale_dtype: DType = FLOAT32
    dtype: DType = FLOAT32
    zeros: tuple[int, int] | None = None
    tile: int = 1
    codes: Array | None = None
    first_code: int = 0
    nested_offset: float | None = None
    nearest_scales: Callable[[Array], Array] | None = None

    @property
    def has_offsets(self) -> bool:
        one = np.ones(1, np.float32)
        return self.start(-one, one)[1] is not None

    def stored_codes(self, codes: Array) -> Array:
        """Codes as the encoder packs them, uint8."""
        if self.codes is not None:
            return self.codes[codes]
        return codes + np.uint8(self.first_code & 255) if self.first_code else codes

    def round_scales(self, scales: Array) -> Array:
        """float32 scales, or biases, as they are after they have been stored."""
        if self.nearest_scales is not None:
            return self.nearest_scales(np.asarray(scales, np.float32))
        return to_float32(cast(np.asarray(scales, np.float32), self.scale_dtype))

    def ranges(self, rows: Array) -> tuple[Array, Array]:
        """The smallest and the largest value of each group of rows (n, I), over its tile: float32 (n, G)."""
        low, high = group_ranges(rows, self.width)
        if self.tile == 1:
            return low, high
        starts = np.arange(0, len(rows), self.tile)
        low, high = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
        return np.repeat(low, self.tile, axis=0)[: len(rows)], np.repeat(high, self.tile, axis=0)[: len(rows)]

    def values(self, result: GroupCodes, group_of_column: Array) -> Array:
        """The values, float32 (n, I). ``group_of_column`` (I,): the group of each column."""
        levels, scales = self.levels[result.codes], result.scales[:, group_of_column]
        if result.offsets is None:
            return self._rounded(levels * scales)
        offsets = result.offsets[:, group_of_column]
        if self.zeros is not None:
            return self._rounded((levels + offsets) * scales)
        return self._rounded(self._rounded(levels * scales) + offsets)

    def _rounded(self, values: Array) -> Array:
        return to_float32(cast(values, self.dtype))


def group_layout(encoder: Encoder, columns: int) -> GroupLayout | None:
    """The layout of an encoder for rows of this many columns; None if its scales are not those of groups in a row."""
    if isinstance(encoder, Gptq | Awq):
        return _with_zeros(encoder, columns)
    if isinstance(encoder, Compressed):
        return _compressed(encoder, columns)
    if isinstance(encoder, mlx.Affine):
        start = functools.partial(mlx.grid, bits=encoder.bits)
        return GroupLayout(_range(0, 2**encoder.bits - 1), encoder.group_size, start, encoder.dtype, encoder.dtype)
    if isinstance(encoder, mlx.Floats):
        mode, dtype = encoder.mode, encoder.dtype
        of_mode = _of_ranges(lambda absmax: mode.scales[mode.scale_bytes(absmax, dtype)])
        return _float_layout(mode.bits, mode.group_size, of_mode, mode.nearest_scales)
    if isinstance(encoder, CompressedFloats):
        own = functools.partial(
            group_scales, scheme=encoder.scheme, dtype=encoder.dtype, global_scale=encoder.global_scale
        )
        return _float_layout(encoder.scheme.bits, encoder.scheme.group_size, _of_ranges(own), encoder.nearest_scales)
    if isinstance(encoder, torchao.RowScales | torchao.UnpackedInt4 | torchao.Int4):
        return _torchao(encoder, columns)
    if isinstance(encoder, Int8):
        return GroupLayout(_range(-127, 127), columns, _of_absmax(127), first_code=-127)
    if isinstance(encoder, FourBit) and columns % BLOCKSIZE == 0:
        order, offset = ASCENDING[encoder.quant_type], encoder.nested_offset
        levels = np.ascontiguousarray(CODES[encoder.quant_type][order])
        return GroupLayout(levels, BLOCKSIZE, _of_absmax(1), dtype=encoder.dtype, codes=order, nested_offset=offset)
    return None


def _torchao(encoder: torchao.RowScales | torchao.UnpackedInt4 | torchao.Int4, columns: int) -> GroupLayout:
    dtype = encoder.dtype
    if isinstance(encoder, torchao.Int4):
        return GroupLayout(_range(-8, 7), encoder.group_size, torchao.int4_grid, dtype, dtype, first_code=-8)
    if isinstance(encoder, torchao.UnpackedInt4):
        return GroupLayout(_range(-8, 7), encoder.group_size, _of_absmax(7.5), dtype, dtype, first_code=-8)
    if isinstance(encoder, torchao.Float8):
        return GroupLayout(_FP8_LEVELS, columns, _of_absmax(FP8_MAX), dtype=dtype, codes=_FP8_CODES)
    return GroupLayout(_range(-128, 127), columns, _of_absmax(127.5), dtype=dtype, first_code=-128)


def _with_zeros(encoder: Gptq | Awq, columns: int) -> GroupLayout:
    """4 or 8 bits with float16 scales, and zero points unless the encoder is symmetric."""
    width = encoder.columns_per_group(columns)
    if isinstance(encoder, Awq):
        return GroupLayout(_range(0, 15), width, _negated(awq.grid), FLOAT16, zeros=(-15, 0))
    half = 2 ** (encoder.bits - 1)
    grid = functools.partial(gptq.grid, bits=encoder.bits, symmetric=encoder.symmetric)
    if encoder.symmetric:
        return GroupLayout(_range(-half, half - 1), width, _without_zeros(grid), FLOAT16)
    return GroupLayout(_range(0, 2 * half - 1), width, _negated(grid), FLOAT16, zeros=(1 - 2 * half, -1))


def _float_layout(bits: int, width: int, start: Start, nearest: Callable[[Array], Array]) -> GroupLayout:
    """Codes that are floats, with scales of one byte."""
    levels, codes = (_FP4_LEVELS, _FP4_CODES) if bits == 4 else (_FP8_LEVELS, _FP8_CODES)
    return GroupLayout(levels, width, start, codes=codes, nearest_scales=nearest)


def _compressed(encoder: Compressed, columns: int) -> GroupLayout:
    scheme, dtype = encoder.scheme, encoder.dtype
    grid = functools.partial(compressed.unsigned_grid, scheme=scheme, dtype=dtype)
    width, low = scheme.group_size or columns, int(scheme.low)
    if scheme.kind == "float":
        return GroupLayout(
            _FP8_LEVELS, width, _without_zeros(grid), dtype, dtype, codes=_FP8_CODES, tile=scheme.block_rows
        )
    if scheme.symmetric:
        return GroupLayout(_range(low, int(scheme.high)), width, _without_zeros(grid), dtype, dtype)
    top = 2**scheme.bits - 1
    return GroupLayout(_range(0, top), width, _negated(grid), dtype, dtype, zeros=(-top, 0))


def _range(low: int, high: int) -> Array:
    return np.arange(low, high + 1, dtype=np.float32)


def _fp8_levels() -> tuple[Array, Array]:
    """The finite values of float8 e4m3, ascending, and their bytes; one zero."""
    codes = np.array([code for code in range(256) if code & 127 != 127 and code != 128], np.uint8)
    values = to_float32(codes.view(FP8))
    order = np.argsort(values)
    return np.ascontiguousarray(values[order]), codes[order]


_FP8_LEVELS, _FP8_CODES = _fp8_levels()
_FP4_CODES = np.array([*range(15, 8, -1), *range(8)], np.uint8)
_FP4_LEVELS = FLOAT4[_FP4_CODES]

Grid = Callable[[Array, Array], tuple[Array, Array]]
"""Zero points and scales of groups from their smallest and largest values."""


def _negated(grid: Grid) -> Start:
    def start(low: Array, high: Array) -> tuple[Array, Array | None]:
        zeros, scales = grid(low, high)
        return to_float32(scales), -zeros.astype(np.float32)

    return start


def _without_zeros(grid: Grid) -> Start:
    return lambda low, high: (to_float32(grid(low, high)[1]), None)


def _of_ranges(scales: Callable[[Array], Array]) -> Start:
    """Scales from the largest magnitudes."""
    return lambda low, high: (scales(np.maximum(-low, high)), None)


def _of_absmax(highest: float) -> Start:
    return lambda low, high: (np.maximum(-low, high) / np.float32(highest), None)
