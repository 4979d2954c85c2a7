"""Values that an output cannot hold: NaN and infinities, and magnitudes beyond float16. Counted for each tensor, then
refused.

Every range of rows is checked here on its way to its encoder. After the first refusal nothing more is encoded, but the
rest is still checked, so that one refusal names every tensor concerned.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.formats.base import OutputTensor
from gemma2tool.model.lazy import BFLOAT16, FLOAT16, FLOAT32, Array, LazyTensor, MappedRows, to_float32
from gemma2tool.quantizers.base import limit_of
from gemma2tool.quantizers.casts import any_beyond

LARGEST_FLOAT16 = 65504.0
_FLOATS = (FLOAT32, FLOAT16, BFLOAT16, np.dtype(np.float64))
_MAX_NAMED = 5


@dataclass
class _Count:
    """How many values of one tensor, and the first of them."""

    origin: str
    values: int = 0
    first: int = -1
    place: tuple[int, ...] = ()
    value: float = 0.0

    def __str__(self) -> str:
        of = "1 value" if self.values == 1 else f"{self.values} values, the first"
        return f"{self.origin}: {of} at {self.place}: {self.value:g}"


class ValueCheck:
    """Decides which values may be encoded.

    ``allow_nonfinite``: float types store NaN and infinities as they are. ``clip``: finite magnitudes beyond float16
    become its largest. ``thorough``: keep checking after the first refusal; not where reading a tensor means
    calibrating it.
    """

    def __init__(self, *, allow_nonfinite: bool = False, clip: bool = False, thorough: bool = True) -> None:
        self.allow_nonfinite, self.clip, self.thorough = allow_nonfinite, clip, thorough
        self._lock = threading.Lock()
        self._nonfinite: dict[int, _Count] = {}
        self._overflow: dict[int, _Count] = {}
        self._quantized = False

    @property
    def refused(self) -> bool:
        return bool(self._nonfinite or self._overflow)

    def admit(self, item: OutputTensor, rows: Array, first: int) -> tuple[Array | None, int]:
        """Rows from ``first`` on as they may be encoded (None once anything has been refused), and how many were
        clipped.
        """
        limit = limit_of(item.encoder)
        clipped = 0
        if rows.dtype in _FLOATS and any_beyond(rows, limit):
            rows, clipped = self._look(item, rows, first, limit)
            if not self.thorough:
                self.raise_refusal()
        return (None if self.refused else rows), clipped

    def _look(self, item: OutputTensor, rows: Array, first: int, limit: float) -> tuple[Array, int]:
        values = rows if rows.dtype == np.float64 else to_float32(rows)
        nonfinite = ~np.isfinite(values)
        beyond = (np.abs(values) >= limit) & ~nonfinite
        if nonfinite.any() and not (self.allow_nonfinite and item.encoder.lossless):
            self._quantized |= not item.encoder.lossless
            self._count(self._nonfinite, item, values, nonfinite, first)
        if not beyond.any():
            return rows, 0
        if not self.clip:
            self._count(self._overflow, item, values, beyond, first)
            return rows, 0
        return clipped(values), int(np.count_nonzero(beyond))

    def _count(self, counts: dict[int, _Count], item: OutputTensor, values: Array, mask: Array, first: int) -> None:
        place = tuple(map(int, np.argwhere(mask)[0]))
        at = first * item.source.row_size + int(np.flatnonzero(mask)[0])
        with self._lock:
            count = counts.setdefault(id(item), _Count(item.source.origin))
            count.values += int(np.count_nonzero(mask))
            if count.first < 0 or at < count.first:
                count.first, count.place, count.value = at, (place[0] + first, *place[1:]), float(values[place])

    def raise_refusal(self) -> None:
        """Raises ``InputRefused`` that names the tensors, if any value was refused."""
        if self._nonfinite:
            hint = "use a different copy of the checkpoint, or store the values as they are with --allow-nonfinite"
            if self._quantized:
                hint = "use a different copy of the checkpoint: no quantized type can hold them"
            raise InputRefused(
                "weights.nonfinite", _counts_sentence("NaN or infinite values", self._nonfinite.values()), hint=hint
            )
        if self._overflow:
            raise InputRefused(
                "weights.f16-overflow",
                _counts_sentence("values beyond float16, whose largest is 65504,", self._overflow.values()),
                hint="use --dtype bf16 or f32, another type, or --clip-f16 to store the largest float16 instead",
            )


def _counts_sentence(what: str, counts: Iterable[_Count]) -> str:
    by_origin = {count.origin: count for count in counts}  # several outputs may have read the same tensor
    ordered = sorted(by_origin.values(), key=lambda count: count.origin)
    tensors = "1 tensor" if len(ordered) == 1 else f"{len(ordered)} tensors"
    more = f"; and {len(ordered) - _MAX_NAMED} more" if len(ordered) > _MAX_NAMED else ""
    return f"{what} in {tensors}: " + "; ".join(map(str, ordered[:_MAX_NAMED])) + more


def clipped(values: Array) -> Array:
    """Finite magnitudes beyond float16 become its largest, 65504; everything else stays. float32 or float64."""
    limited = np.clip(values, -LARGEST_FLOAT16, LARGEST_FLOAT16)
    return np.where(np.isfinite(values), limited, values).astype(values.dtype, copy=False)


def clipped_tensor(tensor: LazyTensor) -> LazyTensor:
    """The tensor with its values clipped, in float32."""
    return MappedRows(tensor, lambda rows: clipped(to_float32(rows)), FLOAT32)
