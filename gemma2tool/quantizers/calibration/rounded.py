"""One block of many rows, rounded."""

from __future__ import annotations

from dataclasses import dataclass

from gemma2tool.model.lazy import Array


@dataclass(frozen=True)
class Rounded:
    """``blocks`` uint8 (n, block bytes), ``errors`` over the factor's diagonal, float32 (n, columns), and their sums of
    squares, float32 (n,).
    """

    blocks: Array
    errors: Array
    losses: Array

    def improve(self, other: Rounded) -> None:
        """Take the rows that ``other`` rounds with smaller errors."""
        better = other.losses < self.losses
        self.blocks[better], self.errors[better] = other.blocks[better], other.errors[better]
        self.losses[better] = other.losses[better]
