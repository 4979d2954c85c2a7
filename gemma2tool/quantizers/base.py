"""What every quantizer is: rows of a matrix in, the stored parts out, and back. Knows nothing of files or of Gemma.

An *encoder* turns ranges of rows into one or several *parts* (codes, scales, ...), each an array whose bytes for consecutive ranges
simply follow one another. A part whose bytes depend on the whole tensor is ``streamed=False``: it is made once, by ``finish``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from gemma2tool.model.lazy import Array


@dataclass(frozen=True)
class Part:
    """One stored array of an encoded tensor.

    ``suffix`` is appended to the tensor's name ("" for the main part); ``dtype`` is in safetensors' spelling ("BF16", "U8", ...) or
    a GGUF type name ("Q8_0"); ``shape`` is the stored shape; ``nbytes`` its size in bytes.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    streamed: bool = True


class Encoder(Protocol):
    """Rows to parts. Instances are immutable and may be called from several threads."""

    @property
    def name(self) -> str:
        """The type's name as the command line spells it ("q8_0", "nf4", "bf16")."""

    @property
    def lossless(self) -> bool:
        """Whether decoding gives back exactly what was encoded, for every input of the encoder's own dtype."""

    @property
    def collects(self) -> tuple[str, ...]:
        """Suffixes of ``encode``'s result that are not written but handed, concatenated in row order, to ``finish``."""

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """The stored arrays of a tensor of this shape, streamed ones first."""

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        """Ranges of rows must start at multiples of this many rows (blocks may span rows)."""

    def encode(self, rows: Array) -> Mapping[str, Array]:
        """Encode a range of rows ``(n, *shape[1:])`` of any float dtype; returns streamed parts by suffix, C-contiguous.

        May also return arrays under suffixes that ``finish`` collects (see ``collects``).
        """

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        """The parts that are not streamed, by suffix."""


def limit_of(encoder: Encoder) -> float:
    """The magnitude from which on what ``encoder`` stores would be infinite, or decode to NaN: its attribute ``limit``; infinity where
    it has none, because every finite value of the source can be stored."""
    return getattr(encoder, "limit", math.inf)


FLOAT16_LIMIT = 65520.0
"""The first magnitude that rounds to a float16 infinity."""
