"""Invertible steps between canonical tensors and a format's own, and the tables made of them.

A format's table is a list of ``Row``: the name on disk, the canonical tensors it carries (several are stacked by rows) and the
steps from the canonical form to the one on disk. Reading runs the inverse steps backwards, writing runs the steps forwards, both
from the same row, so that nothing is written twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import FLOAT16, FLOAT32, LazyTensor, MappedRows, RowRange, StackedRows, to_float32
from gemma2tool.model.tensors import tensor_specs


class Step(Protocol):
    """An invertible map of a tensor. ``exact``: whether ``invert(apply(t))`` is t for every t."""

    exact: bool

    def apply(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor: ...

    def invert(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor: ...


@dataclass(frozen=True)
class AddOne:
    """Stores w + 1 where the canonical form stores w, in float32.

    As llama.cpp's converter does it: bfloat16 and float32 are added in float32, float16 in float16 before it is widened. Low bits
    of a small w are lost where w + 1 cannot hold them.
    """

    exact: bool = False

    def apply(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor:
        if tensor.dtype == FLOAT16:
            return MappedRows(tensor, lambda w: (w + np.float16(1)).astype(FLOAT32), FLOAT32)
        return MappedRows(tensor, lambda w: w.astype(FLOAT32) + np.float32(1), FLOAT32)

    def invert(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor:
        # Below 0.5, float32 can have bits that w loses; honest files have none there, damaged ones may.
        return MappedRows(
            tensor,
            lambda w: w.astype(FLOAT32) - np.float32(1),
            FLOAT32,
            exact=lambda w: w.astype(np.float64) - 1,
        )


@dataclass(frozen=True)
class Row:
    """A line of a format's table; ``{i}`` in the names is the layer."""

    disk: str
    canonical: tuple[str, ...]
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A ``Row`` for one layer: names filled in."""

    disk: str
    canonical: tuple[str, ...]
    steps: tuple[Step, ...]


def entries(table: Sequence[Row], config: Gemma2Config) -> list[Entry]:
    """The table's rows for every layer, in the table's order within a layer; rows outside layers where the table has them."""
    layered = [row for row in table if "{i}" in row.disk]
    result: list[Entry] = []
    done = False
    for row in table:
        if "{i}" not in row.disk:
            result.append(Entry(row.disk, row.canonical, row.steps))
        elif not done:
            done = True
            for i in range(config.num_hidden_layers):
                for each in layered:
                    names = tuple(name.format(i=i) for name in each.canonical)
                    result.append(Entry(each.disk.format(i=i), names, each.steps))
    return result


def to_canonical(table: Sequence[Row], disk: Mapping[str, LazyTensor], config: Gemma2Config) -> dict[str, LazyTensor]:
    """Canonical tensors of the disk tensors that the table knows; names that the table lacks are kept as they are, so that the
    check against the tensor table names them."""
    specs = tensor_specs(config)
    left = dict(disk)
    result: dict[str, LazyTensor] = {}
    for entry in entries(table, config):
        tensor = left.pop(entry.disk, None)
        if tensor is None:
            continue
        for step in reversed(entry.steps):
            tensor = step.invert(tensor, config)
        if len(entry.canonical) == 1:
            result[entry.canonical[0]] = tensor
            continue
        first = 0
        counts = [specs[name].shape[0] for name in entry.canonical]
        if sum(counts) != tensor.shape[0]:
            raise InputRefused(
                "checkpoint.shape",
                f"{tensor.origin}: has {tensor.shape[0]} rows, the config asks for {' + '.join(map(str, counts))}",
                hint="the config contradicts the weights: pass the right one with --config",
            )
        for name, count in zip(entry.canonical, counts, strict=True):
            result[name] = RowRange(tensor, first, first + count)
            first += count
    result.update(left)
    return result


def to_disk(
    table: Sequence[Row], tensors: Mapping[str, LazyTensor], config: Gemma2Config
) -> list[tuple[Entry, LazyTensor]]:
    """The disk tensors of canonical ones, in the table's order; entries whose canonical tensors are absent are left out."""
    result = []
    for entry in entries(table, config):
        if not all(name in tensors for name in entry.canonical):
            continue
        pieces = [tensors[name] for name in entry.canonical]
        tensor = pieces[0] if len(pieces) == 1 else StackedRows(pieces)
        for step in entry.steps:
            tensor = step.apply(tensor, config)
        result.append((entry, tensor))
    return result


def expected_after_roundtrip(
    table: Sequence[Row], tensors: Mapping[str, LazyTensor], config: Gemma2Config
) -> dict[str, LazyTensor]:
    """The canonical tensors that the table's inexact steps change, as they are after the way to disk and back, in float32.

    Only tensors with an inexact step (norms, which are small) are read.
    """
    found: dict[str, LazyTensor] = {}
    for entry in entries(table, config):
        if all(step.exact for step in entry.steps):
            continue
        for name in entry.canonical:
            if name not in tensors:
                continue
            there = tensors[name]
            for step in entry.steps:
                there = step.apply(there, config)
            for step in reversed(entry.steps):
                there = step.invert(there, config)
            if to_float32(there.load()).tobytes() != to_float32(tensors[name].load()).tobytes():  # -0.0 counts
                found[name] = there
    return found


def convention_losses(
    table: Sequence[Row], tensors: Mapping[str, LazyTensor], config: Gemma2Config
) -> list[tuple[str, float]]:
    """Canonical tensors that the table's inexact steps cannot hold, with the largest absolute loss of each."""
    found = [
        (name, float(np.abs(to_float32(there.load()) - to_float32(tensors[name].load())).max()))
        for name, there in expected_after_roundtrip(table, tensors, config).items()
    ]
    return [(name, loss) for name, loss in found if loss]
