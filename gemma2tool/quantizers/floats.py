"""The encoder of plain floats: float32, float16 and bfloat16 rounded to nearest even; other types unchanged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gemma2tool.model.lazy import BFLOAT16, DTYPE_NAMES, FLOAT16, FLOAT32, Array, DType, to_float32
from gemma2tool.quantizers.base import FLOAT16_LIMIT, Part
from gemma2tool.quantizers.casts import cast

SAFETENSORS_NAMES = {
    FLOAT32: "F32",
    FLOAT16: "F16",
    BFLOAT16: "BF16",
    np.dtype(np.float64): "F64",
    np.dtype(np.complex64): "C64",
}


@dataclass(frozen=True)
class Float:
    """Stores values as ``dtype``: float32, float16 or bfloat16 from any of the three or float64; another type only from
    itself."""

    dtype: DType
    collects: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return DTYPE_NAMES.get(self.dtype, self.dtype.name)

    @property
    def lossless(self) -> bool:
        return True

    @property
    def limit(self) -> float:
        """See ``base.limit_of``."""
        return FLOAT16_LIMIT if self.dtype == FLOAT16 else math.inf

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        return (
            Part("", SAFETENSORS_NAMES[self.dtype], shape, int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize),
        )

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        return 1

    def encode(self, rows: Array) -> Mapping[str, Array]:
        if rows.dtype == self.dtype:
            return {"": rows}
        return {"": cast(to_float32(rows) if rows.dtype == np.float64 else rows, self.dtype)}

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        return {}


def narrows_exactly(values: Array, dtype: DType) -> bool:
    """Whether every value equals itself after a round trip through ``dtype``; NaN never does."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.array_equal(values.astype(dtype).astype(np.float64), values.astype(np.float64)))
