"""What an adapter changes, in the names and layout of the canonical checkpoint, whatever framework wrote it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.model.lazy import Array, LazyTensor, to_float32

FLOAT32_MAX = float(np.finfo(np.float32).max)
HINT = "check that the adapter was trained on this model"
MERGE_ELSEWHERE = "merge it with the library that trained it, then convert the merged model"

Start = Literal["pissa", "olora"]
"""An initialization that takes a low-rank part out of the base's weight before training."""


def refused(kind: str, path: Path, message: str, *, hint: str = HINT) -> InputRefused:
    """The error ``lora.KIND`` for a file of an adapter."""
    return InputRefused(f"lora.{kind}", f"{path.parent.name}/{path.name}: {message}", hint=hint)


@dataclass(frozen=True)
class Delta:
    """``scaling * left @ right`` for a weight of ``shape`` (out, in): left (out, r), right (r, in), float32.

    ``factors`` loads both; they are small. ``magnitude`` (out,): DoRA's length of each row of the sum. ``start``: what
    the training took out of the weight first; ``start_scaling``: the scaling that it took it out with. ``strength``:
    what the user multiplies the whole difference by, which is in ``scaling`` already.
    """

    shape: tuple[int, int]
    rank: int
    factors: Callable[[], tuple[Array, Array]]
    scaling: float
    magnitude: LazyTensor | None = None
    start: Start | None = None
    start_scaling: float = 1.0
    strength: float = 1.0

    @classmethod
    def of(cls, b: LazyTensor, a: LazyTensor, scaling: float, *, transposed: bool = False) -> Delta:
        """``scaling * b @ a`` for matrices (out, r) and (r, in); ``transposed``: for the transpose of that product."""

        def factors() -> tuple[Array, Array]:
            left, right = to_float32(b.load()), to_float32(a.load())
            return (np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)) if transposed else (left, right)

        shape = (b.shape[0], a.shape[1])
        return cls(shape[::-1] if transposed else shape, a.shape[0], factors, scaling)


@dataclass(frozen=True)
class TokenRows:
    """Rows of a matrix that were trained alone: ``values`` (n, D) replace the rows ``indices`` (n,)."""

    indices: tuple[int, ...]
    values: LazyTensor


@dataclass(frozen=True)
class Adapter:
    """An adapter, read.

    ``path``: the file with its weights, for messages. ``files``: all that were read. The rest is by canonical name.
    ``base_weights``: what the adapter's file holds of the base itself; they replace the base's tensors first, and a
    tied head with the embedding. ``replacements``: weights that were trained as a whole. ``deltas``: low-rank
    differences. ``token_rows``: rows of the embedding or the head. ``ties``: a tied head follows what deltas and
    replacements do to the embedding; otherwise it keeps the base's embedding.
    """

    path: Path
    files: tuple[Path, ...]
    deltas: Mapping[str, Delta] = field(default_factory=dict)
    replacements: Mapping[str, LazyTensor] = field(default_factory=dict)
    base_weights: Mapping[str, LazyTensor] = field(default_factory=dict)
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)
    ties: bool = True
    warnings: tuple[str, ...] = ()
