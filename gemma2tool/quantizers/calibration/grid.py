"""The grids of values that types can store, and a matrix that was rounded to one.

A grid decides how rows are rounded with error feedback, and what a rounded row is: a record, from which the values
follow and which the encoder stores as it stores rows that it quantizes itself.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import numpy as np

from gemma2tool.model.lazy import FLOAT32, Array, DType, LazyTensor, to_float32
from gemma2tool.quantizers import awq, compressed, gptq
from gemma2tool.quantizers.awq import Awq
from gemma2tool.quantizers.base import Encoder
from gemma2tool.quantizers.bnb import FourBit, NestedScales
from gemma2tool.quantizers.calibration.group_layouts import GroupCodes, GroupLayout, group_layout
from gemma2tool.quantizers.compressed import Compressed
from gemma2tool.quantizers.gguf_encoders import Blocks
from gemma2tool.quantizers.gguf_types import GGUF_TYPES, dequantize, row_bytes
from gemma2tool.quantizers.gptq import Gptq
from gemma2tool.quantizers.groups import GroupScales, Rule, group_ranges, quantize_groups

if TYPE_CHECKING:
    from gemma2tool.quantizers.calibration.hessian import Factor
    from gemma2tool.quantizers.calibration.rounding import Parameters


_STEPS = {"Q5_K": 160e3, "Q4_K": 110e3, "Q2_K": 110e3, "Q6_K": 70e3, "Q3_K": 46e3, "IQ4_XS": 88e3, "TQ1_0": 70e3,
          "TQ2_0": 70e3, "IQ2_XXS": 260e3, "IQ2_XS": 280e3, "IQ2_S": 580e3, "IQ3_XXS": 100e3,
          "IQ3_S": 200e3}  # fmt: skip
_FEWEST_STEPS = 20e3
"""See ``Grid.steps``. Measured with AVX-512, whose products are fast too."""


class Grid(Protocol):
    """The values that an encoder can store. ``group_size`` columns share scales."""

    @property
    def group_size(self) -> int: ...

    @property
    def steps(self) -> float:
        """Operations of a large matrix product that take as long as rounding one value."""

    def record_dtype(self, columns: int) -> DType:
        """The dtype of a rounded row."""

    def round_rows(self, rows: Array, factors: Sequence[Factor]) -> Array:
        """Round float rows (n, I) with error feedback to records (n,)."""

    def values(self, records: Array, group_of_column: Array) -> Array:
        """The values, float32 (n, I), of records. ``group_of_column`` (I,): the group of scales of each column."""

    @property
    def takes_few_rows(self) -> bool:
        """Whether rows can be rounded a few at a time, in any order. If not, ranges of rows start at multiples of
        ``rounding.ROWS``.
        """

    @property
    def collects(self) -> tuple[str, ...]:
        """Suffixes of parts that ``encoder.finish`` needs besides those of its own."""

    def pack(self, encoder: Encoder, records: Array) -> Mapping[str, Array]:
        """The parts of records as ``encoder`` stores them."""


@runtime_checkable
class CodesEncoder(Encoder, Protocol):
    """An encoder that can also store rows that are codes already."""

    def pack(self, codes: Array, offsets: Array | None, scales: Array) -> Mapping[str, Array]:
        """The parts of rows (n, I) of codes with scales (n, G) and the type's offsets (n, G), None if it has none."""


@dataclass(frozen=True)
class AffineGrid:
    """The values (code - zero) * scale for codes 0 to ``top``. ``group_size`` columns share zero and scale, which
    ``parameters`` derives from their range."""

    top: int
    group_size: int
    parameters: Parameters

    steps: ClassVar[float] = 400.0
    takes_few_rows: ClassVar[bool] = False
    collects: ClassVar[tuple[str, ...]] = ()

    def record_dtype(self, columns: int) -> DType:
        scale = self.parameters(np.zeros(1, FLOAT32), np.ones(1, FLOAT32))[1].dtype
        groups = columns // self.group_size
        return np.dtype([("codes", np.uint8, (columns,)), ("zeros", np.uint8, (groups,)), ("scales", scale, (groups,))])

    def round_rows(self, rows: Array, factors: Sequence[Factor]) -> Array:
        from gemma2tool.quantizers.calibration.rounding import round_rows

        return self.records(*round_rows(rows, factors, self))

    def records(self, codes: Array, zeros: Array, scales: Array) -> Array:
        """Codes uint8 (n, I), zeros uint8 and scales (n, G) as records (n,)."""
        records = np.empty(len(codes), self.record_dtype(codes.shape[1]))
        records["codes"], records["zeros"], records["scales"] = codes, zeros, scales
        return records

    def values(self, records: Array, group_of_column: Array) -> Array:
        return gptq.dequantize(*_fields(records), group_of_column)

    def pack(self, encoder: Encoder, records: Array) -> Mapping[str, Array]:
        assert isinstance(encoder, CodesEncoder)
        return encoder.pack(*_fields(records))


def _fields(records: Array) -> tuple[Array, Array, Array]:
    codes, zeros, scales = (np.ascontiguousarray(records[name]) for name in ("codes", "zeros", "scales"))
    return codes, zeros, scales


@dataclass(frozen=True)
class BlockGrid:
    """The values of a GGUF block type."""

    type: str

    takes_few_rows: ClassVar[bool] = True
    collects: ClassVar[tuple[str, ...]] = ()

    @property
    def group_size(self) -> int:
        """Columns of a block."""
        return GGUF_TYPES[self.type].block_elements

    @property
    def steps(self) -> float:
        return _STEPS.get(self.type, _FEWEST_STEPS)

    def record_dtype(self, columns: int) -> DType:
        return np.dtype([("blocks", np.uint8, (row_bytes(self.type, columns),))])

    def round_rows(self, rows: Array, factors: Sequence[Factor]) -> Array:
        from gemma2tool.quantizers.calibration.block_rounding import round_blocks

        return round_blocks(self.type, rows, factors).view(self.record_dtype(rows.shape[1]))[:, 0]

    def values(self, records: Array, group_of_column: Array) -> Array:
        return dequantize(self.type, np.ascontiguousarray(records["blocks"]), len(group_of_column))

    def pack(self, encoder: Encoder, records: Array) -> Mapping[str, Array]:
        return {"": np.ascontiguousarray(records["blocks"])}


@dataclass(frozen=True)
class GroupGrid:
    """The values of a type whose groups, or rows, have a scale."""

    layout: GroupLayout

    steps: ClassVar[float] = 120e3
    takes_few_rows: ClassVar[bool] = False

    @property
    def group_size(self) -> int:
        return self.layout.width

    @property
    def collects(self) -> tuple[str, ...]:
        return () if self.layout.nested_offset is None else (".nested_absmax",)

    def record_dtype(self, columns: int) -> DType:
        groups, layout = -(-columns // self.layout.width), self.layout
        fields = [("codes", np.uint8, (columns,)), ("scales", layout.scale_dtype, (groups,))]
        if layout.has_offsets:
            fields.append(("offsets", np.int16 if layout.zeros else layout.scale_dtype, (groups,)))
        if layout.nested_offset is not None:
            fields += [("scale_codes", np.uint8, (groups,)), ("nested_absmax", np.float32, (groups,))]
        return np.dtype(fields)

    def round_rows(self, rows: Array, factors: Sequence[Factor]) -> Array:
        from gemma2tool.quantizers.calibration.group_rounding import round_groups

        result = round_groups(rows, factors, self.layout)
        records = np.empty(len(rows), self.record_dtype(rows.shape[1]))
        records["codes"], records["scales"] = result.codes, result.scales
        if result.offsets is not None:
            records["offsets"] = result.offsets
        if result.nested is not None:
            records["scale_codes"], records["nested_absmax"] = result.nested.codes, result.nested.absmax
        return records

    def values(self, records: Array, group_of_column: Array) -> Array:
        offsets = to_float32(records["offsets"]) if self.layout.has_offsets else None
        return self.layout.values(GroupCodes(records["codes"], to_float32(records["scales"]), offsets), group_of_column)

    def pack(self, encoder: Encoder, records: Array) -> Mapping[str, Array]:
        codes = self.layout.stored_codes(np.ascontiguousarray(records["codes"]))
        if self.layout.nested_offset is not None:
            assert isinstance(encoder, FourBit)
            return encoder.pack_nested(codes, NestedScales(records["scale_codes"], records["nested_absmax"]))
        assert isinstance(encoder, CodesEncoder)
        offsets = np.ascontiguousarray(records["offsets"]) if self.layout.has_offsets else None
        if offsets is not None and self.layout.zeros is not None:
            offsets = (-offsets).astype(np.uint8)
        return encoder.pack(codes, offsets, np.ascontiguousarray(records["scales"]))


def grid_of(encoder: Encoder, columns: int, *, textbook: bool = False) -> Grid | None:
    """The grid of an encoder whose codes can be chosen freely, for rows of this many columns; None for any other
    encoder. ``textbook``: scales by the type's own rule, where GPTQ or AWQ is defined by it.
    """
    if isinstance(encoder, Blocks):
        return BlockGrid(encoder.type)
    if textbook:
        return _textbook_grid(encoder, columns)
    layout = group_layout(encoder, columns)
    return None if layout is None else GroupGrid(layout)


def _textbook_grid(encoder: Encoder, columns: int) -> AffineGrid | None:
    if isinstance(encoder, Gptq):
        parameters = functools.partial(gptq.grid, bits=encoder.bits, symmetric=encoder.symmetric)
        return AffineGrid(2**encoder.bits - 1, encoder.columns_per_group(columns), parameters)
    if isinstance(encoder, Awq):
        return AffineGrid(2**awq.BITS - 1, encoder.columns_per_group(columns), awq.grid)
    if isinstance(encoder, Compressed) and encoder.scheme.packed and encoder.scheme.bits == 4:
        scheme = encoder.scheme
        parameters = functools.partial(compressed.unsigned_grid, scheme=scheme, dtype=encoder.dtype)
        return AffineGrid(2**scheme.bits - 1, scheme.group_size or columns, parameters)
    return None


class RoundedMatrix(LazyTensor):
    """A matrix (O, I) rounded to ``grid``: ``records`` (O,). ``group_of_column`` (I,): the group of scales of each
    column.
    """

    dtype = FLOAT32
    stored = "codes"

    def __init__(self, grid: Grid, records: Array, group_of_column: Array, origin: str) -> None:
        self.grid, self.records, self.group_of_column = grid, records, group_of_column
        self.shape, self.origin = (len(records), len(group_of_column)), origin

    def load_rows(self, first: int, last: int) -> Array:
        """The values of these rows, float32 (n, I)."""
        return self.grid.values(self.records[first:last], self.group_of_column)


def quantize_to_nearest(rows: Array, grid: AffineGrid) -> tuple[Array, Array, Array]:
    """Quantize float32 rows (n, I) to the nearest codes: codes uint8 (n, I), zeros and scales (n, G)."""
    zeros, scales = grid.parameters(*group_ranges(rows, grid.group_size))
    codes = quantize_groups(rows, GroupScales(grid.group_size, scales, zeros), Rule.ADD_ZERO, 0, grid.top)
    return codes, zeros, scales
