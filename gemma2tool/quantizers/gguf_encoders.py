"""Encoders for GGUF's types: quantize rows of any float dtype, or pass stored blocks through unchanged."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from gemma2tool.model.lazy import FLOAT32, Array
from gemma2tool.quantizers.base import FLOAT16_LIMIT, Part
from gemma2tool.quantizers.casts import cast
from gemma2tool.quantizers.gguf_types import GGUF_TYPES, quantize, row_bytes


def _part(type: str, shape: tuple[int, ...]) -> Part:
    rows, cols = (1, shape[0]) if len(shape) == 1 else shape
    return Part("", type, shape, rows * row_bytes(type, cols))


@dataclass(frozen=True, eq=False)
class Blocks:
    """Quantizes rows to a block type. ``importance``, float32 (cols,), weights the columns.

    ``encode`` raises ``ValueError`` for a type that requires importance and has none.
    """

    type: str
    importance: Array | None = None
    collects: tuple[str, ...] = ()

    limit: ClassVar[float] = FLOAT16_LIMIT
    """Scales are float16; an infinite scale turns the whole block into NaN. llama-quantize detects that only in the
    finished blocks."""

    @property
    def name(self) -> str:
        return self.type.lower()

    @property
    def lossless(self) -> bool:
        return False

    @functools.cached_property
    def codes_key(self) -> tuple[str, bytes | None]:
        """See ``base.codes_key``."""
        is_weighted = self.importance is not None and GGUF_TYPES[self.type].takes_importance
        return self.type, self.importance.tobytes() if is_weighted and self.importance is not None else None

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        return (_part(self.type, shape),)

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        return 1

    def encode(self, rows: Array) -> Mapping[str, Array]:
        return {"": quantize(self.type, cast(rows, FLOAT32), self.importance)}

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        return {}


@dataclass(frozen=True)
class Copied:
    """Writes rows that are already stored blocks of ``type``, uint8 (n, row bytes) of ``cols`` values each,
    unchanged."""

    type: str
    cols: int
    collects: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.type.lower()

    @property
    def lossless(self) -> bool:
        return True

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """``shape``: of the blocks' bytes, (rows, row bytes). The stored shape is (rows, cols)."""
        stored = (shape[0], self.cols)
        return (_part(self.type, stored),)

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        return 1

    def encode(self, rows: Array) -> Mapping[str, Array]:
        return {"": rows}

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        return {}


def block_elements() -> Mapping[str, int]:
    """How many elements a block of each type has."""
    return {name: row.block_elements for name, row in GGUF_TYPES.items()}
