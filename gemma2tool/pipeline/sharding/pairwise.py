"""A sum whose bits do not depend on how many machines added it up.

The summands, in their order, are the leaves of a binary tree whose nodes cover spans of 1, 2, 4, ... summands that
begin at multiples of their length. A run of summands is kept as the few largest nodes inside it: a machine computes
those of its run, and together they give the nodes that one machine computes. Only nodes of equal length are added, the
left one first; at the end those that are left over, from left to right.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

Values = NDArray[Any]


class PairwiseSum:
    """The sum of arrays of one shape, from summand ``first`` on. Holds about log2 of their number of arrays."""

    def __init__(self, first: int = 0) -> None:
        self.first = self.next = first
        self._nodes: list[tuple[int, int, Values]] = []
        """(level, index, sum) of the summands index * 2^level up to the next multiple."""

    def add(self, values: Values, level: int = 0) -> None:
        """Add the next summand, or the node of the next 2^level summands."""
        index = self.next >> level
        if index << level != self.next:
            raise ValueError(f"a node of 2^{level} summands does not begin at summand {self.next}")
        self.next += 1 << level
        while self._nodes and self._nodes[-1][:2] == (level, index - 1) and index % 2:
            values = self._nodes.pop()[2] + values
            level, index = level + 1, index // 2
        self._nodes.append((level, index, values))

    @property
    def nodes(self) -> list[Values]:
        """The sums of ``levels(first, next)``."""
        return [values for _, _, values in self._nodes]

    def total(self) -> Values:
        """The sum of all summands, which begin at 0."""
        total, *others = self.nodes
        for values in others:
            total = total + values
        return total


def levels(first: int, last: int) -> list[int]:
    """The levels of the nodes that summands ``first`` to ``last`` are kept as, from left to right."""
    levels_of_nodes = []
    while first < last:
        largest = (last - first).bit_length() - 1
        aligned = (first & -first).bit_length() - 1 if first else largest
        levels_of_nodes.append(min(largest, aligned))
        first += 1 << levels_of_nodes[-1]
    return levels_of_nodes
