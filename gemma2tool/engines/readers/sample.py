"""Which rows of a tensor are compared."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

WHOLE_VALUES = 1 << 14
"""A tensor with at most so many values is compared whole, as is every vector."""
MAX_VECTOR = 1 << 16
RANDOM_ROWS = 4

Range = tuple[int, int]


def sampled_ranges(name: str, shape: Sequence[int]) -> list[Range]:
    """Ranges of rows (first, last), ascending: the first row, the last, and some that depend on the name alone."""
    if not shape:
        return [(0, 1)]
    rows, values = shape[0], math.prod(shape)
    if values <= WHOLE_VALUES or (len(shape) == 1 and rows <= MAX_VECTOR):
        return [(0, rows)] if rows else []
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    words = (int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(RANDOM_ROWS))
    return [(row, row + 1) for row in sorted({0, rows - 1, *(word % rows for word in words)})]
