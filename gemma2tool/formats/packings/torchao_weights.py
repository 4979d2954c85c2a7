"""Weights that torchao quantized, in safetensors: P._weight_qdata and, by the layout, P._weight_scale,
P._weight_zero_point or P._weight_scale_and_zero; P._weight_act_pre_scale of AWQ and SmoothQuant.

The metadata of the files names the layout of each weight, its shape and its dtype. A file that has lost them is read by
its tensors, which torchao itself does not do. Checked against torchao 0.18.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused
from gemma2tool.formats.packings.base import QuantizedWeight
from gemma2tool.formats.packings.parts import FLOATS, HINT, INT8, INT32, UINT8, required_part
from gemma2tool.model.lazy import BFLOAT16, FLOAT32, FLOAT_DTYPES, Array, DType, LazyTensor, to_float32
from gemma2tool.quantizers import torchao
from gemma2tool.quantizers.float_codes import FP8
from gemma2tool.storage.quoting import quoted

CODES = "._weight_qdata"
SCALES = "._weight_scale"
ZERO_POINTS = "._weight_zero_point"
SCALES_AND_ZEROS = "._weight_scale_and_zero"
INPUT_SCALE = "._weight_act_pre_scale"
STATIC = ("._weight_act_quant_scale", "._weight_act_quant_zero_point")
"""Of activations with a fixed scale; they do not change the weight."""

_FP8_E5M2 = np.dtype(ml_dtypes.float8_e5m2)
_DTYPES = {dtype.name: dtype for dtype in FLOAT_DTYPES.values()}
_MAX_METADATA = 1 << 16
_TILE_ROWS, _LANES, _PAIR = 8, 32, 32
"""Rows of a tile of ``tile_packed_to_4d``, words of it, columns of a word's pair of tiles."""
_WIDEST_PADDING = 1024
UNPACKED = "IntxUnpackedToInt8Tensor"
_READ = ("Int8Tensor", "Float8Tensor", "Int4Tensor", "Int4TilePackedTo4dTensor", UNPACKED)
_DEQUANTIZE = "load the model with torchao, on a device that it runs on, dequantize it and save it again"


@dataclass(frozen=True)
class Layout:
    """What the metadata say of one weight; None for what they do not say. ``kind``: torchao's class. ``bits``: of a
    code that is stored in a whole byte. ``block``: rows and columns that share a scale.
    """

    kind: str | None = None
    dtype: DType | None = None
    bits: int | None = None
    shape: tuple[int, ...] | None = None
    block: tuple[int, ...] | None = None


def read_layout(metadata: Mapping[str, str], module: str) -> Layout:
    """The layout of ``module``'s weight. Raises ``InputRefused`` for metadata that are not JSON."""
    names = (f"{module}.weight", f"{module.removeprefix('model.')}.weight")
    text = next((metadata[name] for name in names if name in metadata), None)
    if text is None:
        return Layout()
    entry = strict_json.load(text.encode(), what=f"metadata of {module}.weight", max_bytes=_MAX_METADATA)
    entry = entry if isinstance(entry, dict) else {}
    data = entry.get("_data")
    data = data if isinstance(data, dict) else {}
    kind = entry.get("_type")
    target = _inner(data.get("target_dtype")).removeprefix("int")
    return Layout(
        kind=kind if isinstance(kind, str) else None,
        dtype=_DTYPES.get(_inner(data.get("dtype"))),
        bits=int(target) if target in map(str, range(1, 9)) else None,
        shape=_whole_numbers(data.get("shape")),
        block=_whole_numbers(data.get("block_size")),
    )


def _inner(value: object) -> str:
    inner = value.get("_data") if isinstance(value, dict) else None
    return inner if isinstance(inner, str) else ""


def _whole_numbers(value: object) -> tuple[int, ...] | None:
    is_list = isinstance(value, list) and all(type(number) is int and number > 0 for number in value)
    return tuple(value) if is_list and isinstance(value, list) else None


def quantized_modules(names: Iterable[str]) -> list[str]:
    """The modules that have a part of a quantized weight among ``names``, in their order."""
    ends = (CODES, SCALES, SCALES_AND_ZEROS, ZERO_POINTS)
    return list(dict.fromkeys(name.removesuffix(end) for name in names for end in ends if name.endswith(end)))


def weight(raw: Mapping[str, LazyTensor], module: str, layout: Layout, dtype: DType) -> QuantizedWeight:
    """The weight of a module. ``dtype``: the model's, where ``layout`` has none.

    Raises ``InputRefused`` for a layout that is not read, and for parts that contradict one another.
    """
    if layout.kind not in (None, *_READ):
        raise InputRefused("torchao.layout", f"{quoted(module)}: the layout {quoted(layout.kind)}", hint=_DEQUANTIZE)
    parts = {module + CODES} | {name for end in STATIC if (name := module + end) in raw}
    zero_points = raw.get(module + ZERO_POINTS)
    tensor: LazyTensor
    if module + SCALES_AND_ZEROS in raw:
        tensor = _tiled(raw, module, layout)
        parts.add(module + SCALES_AND_ZEROS)
    else:
        is_packed = zero_points is not None and zero_points.dtype in FLOATS and layout.kind != UNPACKED
        read = _packed if layout.kind == "Int4Tensor" or is_packed else _codes
        tensor = read(raw, module, layout, dtype)
        parts |= {module + SCALES} | ({module + ZERO_POINTS} if zero_points is not None else set())
    if module + INPUT_SCALE in raw:
        scale = required_part(raw, module + INPUT_SCALE, FLOATS, None)
        if scale.size != tensor.shape[1]:
            raise _contradiction(scale, tensor)
        tensor = PreScaledTensor(tensor, scale)
        parts.add(module + INPUT_SCALE)
    return QuantizedWeight(f"{module}.weight", tensor, parts)


def _codes(raw: Mapping[str, LazyTensor], module: str, layout: Layout, dtype: DType) -> LazyTensor:
    codes, scales = _stored_codes(raw, module), required_part(raw, module + SCALES, FLOATS, None)
    if (
        codes.dtype not in (INT8, FP8, _FP8_E5M2)
        or len(codes.shape) != 2
        or not _fits(scales.shape, codes.shape, layout)
    ):
        raise InputRefused(
            "torchao.layout",
            f"{codes.origin}: {codes.dtype.name} codes of shape {codes.shape} with scales of shape {scales.shape}",
            hint=_DEQUANTIZE,
        )
    zero_points = None
    if module + ZERO_POINTS in raw:
        zero_points = required_part(raw, module + ZERO_POINTS, (INT8,), scales.shape)
    return CodesTensor(codes, scales, zero_points, layout.dtype or dtype, layout.bits)


def _stored_codes(raw: Mapping[str, LazyTensor], module: str) -> LazyTensor:
    """Codes of any type."""
    name = module + CODES
    return required_part(raw, name, (raw[name].dtype if name in raw else INT8,), None)


def _fits(scales: tuple[int, ...], codes: tuple[int, ...], layout: Layout) -> bool:
    """Whether scales of this shape are for the whole tensor, for rows in groups of equal size or for the blocks that
    the metadata say.
    """
    if scales in ((), (1,), (1, 1)):
        return layout.block in (None, codes)
    if len(scales) != 2 or not all(count > 0 and size % count == 0 for size, count in zip(codes, scales, strict=True)):
        return False
    block = (codes[0] // scales[0], codes[1] // scales[1])
    return block == (layout.block or (1, block[1]))


def _packed(raw: Mapping[str, LazyTensor], module: str, layout: Layout, dtype: DType) -> LazyTensor:
    codes = required_part(raw, module + CODES, (INT8, UINT8), None)
    scales = required_part(raw, module + SCALES, FLOATS, None)
    zero_points = required_part(raw, module + ZERO_POINTS, (scales.dtype,), scales.shape)
    if len(codes.shape) != 2 or len(scales.shape) != 2 or scales.shape[1] != codes.rows or not scales.rows:
        raise _contradiction(scales, codes)
    tensor = Int4Tensor(codes, scales, zero_points)
    if tensor.shape[1] % scales.rows or layout.block not in (None, (1, tensor.group_size)):
        raise _contradiction(scales, codes)
    return tensor


def _tiled(raw: Mapping[str, LazyTensor], module: str, layout: Layout) -> LazyTensor:
    words = required_part(raw, module + CODES, (INT32,), None)
    scales = required_part(raw, module + SCALES_AND_ZEROS, (BFLOAT16,), None)
    if len(words.shape) != 4 or words.shape[2] != _LANES or len(scales.shape) != 3 or not scales.rows:
        raise _contradiction(scales, words)
    padded = words.rows * _TILE_ROWS, words.shape[1] * words.shape[3] * _PAIR
    shape = layout.shape or padded
    is_padded = len(shape) == 2 and all(
        0 <= whole - size < limit for whole, size, limit in zip(padded, shape, (16, _WIDEST_PADDING), strict=True)
    )
    group_size = padded[1] // scales.rows
    is_whole = padded[1] % scales.rows == 0 and scales.shape[1:] == (padded[0], 2)
    if not is_padded or not is_whole or layout.block not in (None, (1, group_size)):
        raise _contradiction(scales, words)
    return TiledTensor(words, scales, (shape[0], shape[1]), group_size)


def _contradiction(scales: LazyTensor, codes: LazyTensor) -> InputRefused:
    return InputRefused(
        "packing.part-shape",
        f"{scales.origin}: the shape {scales.shape} of the scales contradicts the shape {codes.shape} of the codes, or"
        " what the metadata say of them",
        hint=HINT,
    )


class CodesTensor(LazyTensor):
    """A weight (O, I) with one code in an element: (code - zero point) * scale in float32, rounded to ``dtype``.

    ``bits``: of the codes' range, None for that of their type.
    """

    def __init__(
        self, codes: LazyTensor, scales: LazyTensor, zero_points: LazyTensor | None, dtype: DType, bits: int | None
    ) -> None:
        self.codes, self.scales, self.zero_points = codes, scales, zero_points
        self.shape, self.dtype, self.origin = codes.shape, dtype, codes.origin
        self.block_rows = self.shape[0] // (1 if scales.size == 1 else scales.rows)
        self.group_size = None if self.block_rows > 1 else self.shape[1] // scales.row_size
        self.stored = self._stored_name(bits)

    def _stored_name(self, bits: int | None) -> str:
        """A type whose limits are known, or "torchao"."""
        if self.block_rows > 1:
            return "torchao"
        if self.codes.dtype == FP8:
            return torchao.Float8().name
        if bits == 4:
            return torchao.UnpackedInt4.name
        is_int8 = self.codes.dtype == INT8 and self.scales.dtype == FLOAT32 and bits is None
        return torchao.Int8WeightOnly().name if is_int8 else "torchao"

    def load_rows(self, first: int, last: int) -> Array:
        zero_points = None if self.zero_points is None else self._by_row(self.zero_points, first, last)
        codes, scales = self.codes.load_rows(first, last), self._by_row(self.scales, first, last)
        return torchao.dequantize(codes, scales, self.dtype, zero_points)

    def _by_row(self, stored: LazyTensor, first: int, last: int) -> Array:
        """Scales or zero points of a range of rows: (n, groups)."""
        if stored.size == 1:
            return np.repeat(stored.load().reshape(1, 1), last - first, axis=0)
        height = self.block_rows
        begin = first - first % height
        blocks = stored.load_rows(begin // height, -(-last // height)).reshape(-1, stored.row_size)
        return blocks if height == 1 else np.repeat(blocks, height, axis=0)[first - begin : last - begin]


class Int4Tensor(LazyTensor):
    """A weight (O, I) of int4 codes, two in a byte, in the type of its scales; scales and zero points are (G, O)."""

    def __init__(self, codes: LazyTensor, scales: LazyTensor, zero_points: LazyTensor) -> None:
        self.codes, self.scales, self.zero_points = codes, scales, zero_points
        self.shape, self.dtype, self.origin = (codes.rows, codes.row_size * 2), scales.dtype, codes.origin
        self.group_size, self.stored = self.shape[1] // scales.rows, torchao.Int4.name

    def load_rows(self, first: int, last: int) -> Array:
        codes = torchao.unpack_int4(self.codes.load_rows(first, last))
        scales, zero_points = (part.load()[:, first:last].T for part in (self.scales, self.zero_points))
        return torchao.dequantize_int4(codes, scales, zero_points)


class TiledTensor(LazyTensor):
    """A weight (O, I) in the order of a GPU's matrix units (``tile_packed_to_4d``), padded.

    ``words`` int32 (O / 8, I / (32 * P), 32, P): word t of a tile has 8 codes of row t // 4: of columns 2 * (t % 4)
    plus 0, 8, 16 and 24, then those of the columns after them. ``scales`` (G, O, 2): scales and zero points.
    """

    def __init__(self, words: LazyTensor, scales: LazyTensor, shape: tuple[int, int], group_size: int) -> None:
        self.words, self.scales = words, scales
        self.shape, self.dtype, self.origin = shape, scales.dtype, words.origin
        self.group_size, self.stored = group_size, torchao.Int4.name

    def load_rows(self, first: int, last: int) -> Array:
        begin, end = first // _TILE_ROWS, -(-last // _TILE_ROWS)
        words = self.words.load_rows(begin, end).view(np.uint32)
        codes = (words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & np.uint32(15)).astype(np.int8) - np.int8(8)
        tiles, steps, _, pairs, _ = codes.shape
        by_place = codes.reshape(tiles, steps, _TILE_ROWS, 4, pairs, 2, 4).transpose(0, 2, 1, 4, 6, 3, 5)
        rows = by_place.reshape(tiles * _TILE_ROWS, -1)[first - begin * _TILE_ROWS : last - begin * _TILE_ROWS]
        scales = self.scales.load()[:, first:last]
        return torchao.dequantize_int4(rows, scales[..., 0].T, scales[..., 1].T)[:, : self.shape[1]]


class PreScaledTensor(LazyTensor):
    """A weight whose input is multiplied by a scale for each column first, as one float32 matrix."""

    stored = "torchao"

    def __init__(self, tensor: LazyTensor, scale: LazyTensor) -> None:
        self.tensor, self.scale = tensor, scale
        self.shape, self.dtype, self.origin, self.group_size = tensor.shape, FLOAT32, tensor.origin, None

    def load_rows(self, first: int, last: int) -> Array:
        return self.tensor.load_rows_f32(first, last) * to_float32(self.scale.load()).reshape(1, -1)
