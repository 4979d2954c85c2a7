"""The interface of all quantizers: rows of a matrix in, stored parts out. Independent of file formats and of Gemma.

An *encoder* turns ranges of rows into one or several *parts* (codes, scales, ...). A part is an array; its bytes for
consecutive ranges of rows are concatenated. A part whose bytes depend on the whole tensor has ``streamed=False``:
``finish`` creates it once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol

from gemma2tool.model.lazy import Array


@dataclass(frozen=True)
class Part:
    """A stored array of an encoded tensor.

    ``suffix``: appended to the tensor's name ("" for the main part). ``dtype``: safetensors' name ("BF16", "U8", ...)
    or a GGUF type ("Q8_0"). ``shape``: the stored shape. ``nbytes``: the stored size.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    streamed: bool = True


class Encoder(Protocol):
    """Encodes rows to parts. Instances are immutable and may be called from several threads."""

    @property
    def name(self) -> str:
        """The name of the type, as the command line spells it ("q8_0", "nf4", "bf16")."""

    @property
    def lossless(self) -> bool:
        """Whether decoding reproduces every input of the encoder's own dtype exactly."""

    @property
    def collects(self) -> tuple[str, ...]:
        """Suffixes in ``encode``'s result that are passed to ``finish``, concatenated in row order, instead of being
        written."""

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """The stored arrays of a tensor of this shape, the streamed ones first."""

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        """Ranges of rows must start at multiples of this many rows (blocks may span rows)."""

    def encode(self, rows: Array) -> Mapping[str, Array]:
        """Encode a range of rows ``(n, *shape[1:])`` of any float dtype to the streamed parts, C-contiguous arrays by
        suffix.

        The result may also have the suffixes in ``collects``.
        """

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        """The parts that are not streamed, by suffix, from the arrays in ``collects``."""


def limit_of(encoder: Encoder) -> float:
    """The smallest magnitude that ``encoder`` stores as infinity, or as a block that decodes to NaN.

    It is the encoder's attribute ``limit``; infinity for an encoder without one, which can store every finite value.
    """
    return float(getattr(encoder, "limit", math.inf))


def codes_key(encoder: Encoder) -> Hashable | None:
    """Equal for two encoders that make equal codes of equal rows.

    It is the encoder's attribute ``codes_key``; None for an encoder without one, whose codes are its own.
    """
    key: Hashable | None = getattr(encoder, "codes_key", None)
    return key


FLOAT16_LIMIT = 65520.0
"""The smallest magnitude that rounds to infinity in float16."""
