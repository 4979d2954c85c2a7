"""Invertible transforms between canonical tensors and a format's own, and the tables made of them.

A format's table is a list of ``TableRow``: the name on disk, the canonical tensors that it carries (several are
stacked by rows), and the transforms from the canonical form to the one on disk. Reading inverts them last to first,
writing applies them first to last. Both use the same row, so that nothing is stated twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import FLOAT16, FLOAT32, Array, LazyTensor, MappedRows, RowRange, StackedRows, to_float32
from gemma2tool.model.tensors import tensor_specs


class Transform(Protocol):
    """An invertible map of a tensor. ``exact``: whether ``invert(apply(t))`` is t for every t."""

    @property
    def exact(self) -> bool: ...

    def apply(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor: ...

    def invert(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor: ...


@dataclass(frozen=True)
class AddOne:
    """Stores w + 1 where the canonical form stores w, in float32.

    As in llama.cpp's converter: bfloat16 and float32 are added in float32, float16 is added in float16 and then
    widened. Low bits of a small w are lost where w + 1 cannot hold them.
    """

    exact: bool = False

    def apply(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor:
        if tensor.dtype == FLOAT16:
            return MappedRows(tensor, lambda w: (w + np.float16(1)).astype(FLOAT32), FLOAT32)
        return MappedRows(tensor, lambda w: w.astype(FLOAT32) + np.float32(1), FLOAT32)

    def invert(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor:
        # A stored value below 0.5 can have bits that w in float32 loses. Intact files have none there, damaged ones
        # may.
        return MappedRows(
            tensor,
            lambda w: w.astype(FLOAT32) - np.float32(1),
            FLOAT32,
            exact=lambda w: w.astype(np.float64) - 1,
        )


@dataclass(frozen=True)
class TableRow:
    """A line of a format's table; ``{i}`` in the names is the layer."""

    disk: str
    canonical: tuple[str, ...]
    transforms: tuple[Transform, ...] = ()


def entries(table: Sequence[TableRow], config: Gemma2Config) -> list[TableRow]:
    """The table with a row for every layer. The rows of the layers come together, where the first of them stands, in
    the table's order within a layer.
    """
    layered = [row for row in table if "{i}" in row.disk]
    expanded: list[TableRow] = []
    for row in table:
        if "{i}" not in row.disk:
            expanded.append(row)
        elif row is layered[0]:
            expanded += [_of_layer(line, layer) for layer in range(config.num_hidden_layers) for line in layered]
    return expanded


def _of_layer(row: TableRow, layer: int) -> TableRow:
    names = tuple(name.format(i=layer) for name in row.canonical)
    return TableRow(row.disk.format(i=layer), names, row.transforms)


def to_canonical(
    table: Sequence[TableRow], disk: Mapping[str, LazyTensor], config: Gemma2Config
) -> dict[str, LazyTensor]:
    """The canonical tensors of the disk tensors that the table knows.

    Others keep their names, so that the check against the tensor table reports them.
    """
    specs = tensor_specs(config)
    unknown = dict(disk)
    canonical: dict[str, LazyTensor] = {}
    for entry in entries(table, config):
        tensor = unknown.pop(entry.disk, None)
        if tensor is None:
            continue
        tensor = inverted(tensor, entry.transforms, config)
        if len(entry.canonical) == 1:
            canonical[entry.canonical[0]] = tensor
            continue
        counts = [specs[name].shape[0] for name in entry.canonical]
        if sum(counts) != tensor.shape[0]:
            raise InputRefused(
                "checkpoint.shape",
                f"{tensor.origin}: has {tensor.shape[0]} rows, the config requires {' + '.join(map(str, counts))}",
                hint="the config contradicts the weights: pass the right one with --config",
            )
        first = 0
        for name, count in zip(entry.canonical, counts, strict=True):
            canonical[name] = RowRange(tensor, first, first + count)
            first += count
    return canonical | unknown


def to_disk(
    table: Sequence[TableRow], tensors: Mapping[str, LazyTensor], config: Gemma2Config
) -> list[tuple[TableRow, LazyTensor]]:
    """The disk tensors of canonical ones, in the table's order, without those whose canonical tensors are absent."""
    stored = []
    for entry in entries(table, config):
        if not all(name in tensors for name in entry.canonical):
            continue
        pieces = [tensors[name] for name in entry.canonical]
        tensor = pieces[0] if len(pieces) == 1 else StackedRows(pieces)
        stored.append((entry, applied(tensor, entry.transforms, config)))
    return stored


def applied(tensor: LazyTensor, transforms: Sequence[Transform], config: Gemma2Config) -> LazyTensor:
    """``tensor`` after the transforms, first to last."""
    for transform in transforms:
        tensor = transform.apply(tensor, config)
    return tensor


def inverted(tensor: LazyTensor, transforms: Sequence[Transform], config: Gemma2Config) -> LazyTensor:
    """``tensor`` with the transforms undone, last to first."""
    for transform in reversed(transforms):
        tensor = transform.invert(tensor, config)
    return tensor


def expected_after_roundtrip(
    table: Sequence[TableRow], tensors: Mapping[str, LazyTensor], config: Gemma2Config
) -> dict[str, LazyTensor]:
    """The canonical tensors that the table's inexact transforms change, as they are after the way to disk and back, in
    float32.

    Only tensors with an inexact transform (norms, which are small) are read.
    """
    changed: dict[str, LazyTensor] = {}
    for entry in entries(table, config):
        if all(transform.exact for transform in entry.transforms):
            continue
        for name in entry.canonical:
            if name not in tensors:
                continue
            expected = inverted(applied(tensors[name], entry.transforms, config), entry.transforms, config)
            if _values(expected).tobytes() != _values(tensors[name]).tobytes():  # as bytes, because -0.0 counts
                changed[name] = expected
    return changed


def convention_losses(
    table: Sequence[TableRow], tensors: Mapping[str, LazyTensor], config: Gemma2Config
) -> list[tuple[str, float]]:
    """The canonical tensors that the table's inexact transforms cannot hold, with the largest absolute loss of each."""
    losses = [
        (name, float(np.abs(_values(expected) - _values(tensors[name])).max()))
        for name, expected in expected_after_roundtrip(table, tensors, config).items()
    ]
    return [(name, loss) for name, loss in losses if loss]


def _values(tensor: LazyTensor) -> Array:
    return to_float32(tensor.load())
