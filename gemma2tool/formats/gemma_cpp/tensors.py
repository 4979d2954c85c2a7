"""Tensors of gemma.cpp files as lazy tensors: codes decoded by ranges of rows, attention heads put side by side."""

from __future__ import annotations

import numpy as np

from gemma2tool.model.lazy import BFLOAT16, FLOAT32, Array, LazyTensor, MappedRows, to_float32
from gemma2tool.quantizers import sfp
from gemma2tool.quantizers.sfp import CLUSTERS, GROUP

_TABLE_SAMPLE = 64


def scaled(tensor: LazyTensor, scale: float) -> LazyTensor:
    """``tensor`` times ``scale``, in float32; unchanged if that is 1."""
    if scale == 1:
        return tensor
    return MappedRows(tensor, lambda rows: to_float32(rows) * np.float32(scale), FLOAT32)


class SfpTensor(LazyTensor):
    """SFP codes times a scale: exact in bfloat16 where the scale is 1, else float32."""

    def __init__(self, codes: LazyTensor, scale: float) -> None:
        self.codes, self.shape, self.stored, self.origin = codes, codes.shape, "sfp", codes.origin
        self.dtype = BFLOAT16 if scale == 1 else FLOAT32
        self.values = (sfp.decoding() * np.float32(scale)).astype(self.dtype)

    def load_rows(self, first: int, last: int) -> Array:
        return self.values[self.codes.load_rows(first, last)]


class NuqTensor(LazyTensor):
    """4-bit clusters of groups of 256 values, which continue from row to row.

    ``together``: each group's centers lie before its indices, as gemma.cpp writes them since January 2025; otherwise
    all centers lie before all indices.
    """

    def __init__(self, codes: LazyTensor, shape: tuple[int, ...], scale: float, *, together: bool) -> None:
        self.codes, self.shape, self.scale, self.together = codes, shape, scale, together
        self.dtype = BFLOAT16 if scale == 1 else FLOAT32
        self.stored, self.origin = "nuq", codes.origin

    def load_rows(self, first: int, last: int) -> Array:
        start, end = first * self.row_size, last * self.row_size
        low, high = start // GROUP, -(-end // GROUP)
        values = sfp.nuq_decode(*self._groups(low, high)).reshape(-1)[start - low * GROUP : end - low * GROUP]
        if self.scale != 1:
            values = values * np.float32(self.scale)
        return values.astype(self.dtype).reshape(last - first, *self.shape[1:])

    def _groups(self, low: int, high: int) -> tuple[Array, Array]:
        """Centers (groups, 16) and packed indices (groups, 128) of groups ``low`` to ``high``."""
        half, total = GROUP // 2, self.codes.rows
        if self.together:
            block = CLUSTERS + half
            raw = _filled(self.codes, low * block, high * block).reshape(-1, block)
            return raw[:, :CLUSTERS], raw[:, CLUSTERS:]
        tables = CLUSTERS * -(-self.size // GROUP)
        centers = self.codes.load_rows(low * CLUSTERS, high * CLUSTERS).reshape(-1, CLUSTERS)
        return centers, _filled(
            self.codes, tables + low * half, min(tables + high * half, total), (high - low) * half
        ).reshape(-1, half)


def _filled(codes: LazyTensor, first: int, last: int, length: int | None = None) -> Array:
    """Bytes ``first`` to ``last``, padded with zeros if the last group of a tensor is not full."""
    result = np.zeros(last - first if length is None else length, np.uint8)
    stored = codes.load_rows(first, min(last, codes.rows))
    result[: len(stored)] = stored
    return result


def interleaved(codes: LazyTensor, values: int) -> bool:
    """Whether a NUQ stream of ``values`` has each group's centers before its indices.

    Centers ascend within a group; the first bytes of a stream with all centers in front ascend in every sixteen.
    """
    groups = min(-(-values // GROUP), _TABLE_SAMPLE)
    centers = sfp.decoding()[codes.load_rows(0, groups * CLUSTERS)].reshape(-1, CLUSTERS)
    return bool((np.diff(centers, axis=1) < 0).any())


class HeadsBesideEachOther(LazyTensor):
    """(H * D, h) as (D, H * h): row d has row d of every head."""

    def __init__(self, source: LazyTensor, heads: int) -> None:
        if len(source.shape) != 2 or source.shape[0] % heads:
            raise ValueError(f"{heads} heads of {source}")
        self.source, self.heads = source, heads
        self.shape = (source.shape[0] // heads, heads * source.shape[1])
        self.dtype, self.stored, self.origin = source.dtype, source.stored, source.origin

    def load_rows(self, first: int, last: int) -> Array:
        starts = (head * self.shape[0] for head in range(self.heads))
        return np.concatenate([self.source.load_rows(start + first, start + last) for start in starts], axis=1)


class HeadsUnderEachOther(LazyTensor):
    """(D, H * h) as (H * D, h), the inverse. Reads the rows it needs whole."""

    def __init__(self, source: LazyTensor, heads: int) -> None:
        self.source, self.heads = source, heads
        self.shape = (source.shape[0] * heads, source.shape[1] // heads)
        self.dtype, self.stored, self.origin = source.dtype, source.stored, source.origin

    def load_rows(self, first: int, last: int) -> Array:
        rows, width = self.source.shape[0], self.shape[1]
        pieces = []
        while first < last:
            head, start = divmod(first, rows)
            end = min(rows, start + last - first)
            pieces.append(self.source.load_rows(start, end)[:, head * width : (head + 1) * width])
            first += end - start
        return np.concatenate(pieces) if pieces else np.empty((0, width), self.dtype)
