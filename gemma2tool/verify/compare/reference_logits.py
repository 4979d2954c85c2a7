"""A few logits that represent a checkpoint: the likeliest tokens after the last positions of one prompt.

They are a by-product of the forward pass of a verification. With them another machine can check the checkpoint later,
without its source, by running the same prompt and comparing the same tokens. ``log_sum``, the logarithm of the sum of
the exponentials of all logits, covers the other logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.progress import Advance
from gemma2tool.verify.compare.token_ids import TokenIds

Logits = NDArray[np.float32]

PROMPT_TOKENS = 256
"""Tokens of the first prompt that are run: a forward pass this short gives the same bits for every number of threads.
"""
POSITIONS = 8
TOKENS = 8


@dataclass(frozen=True)
class ReferenceLogits:
    """Logits of one side, float32.

    ``ids`` (T,): the prompt. ``window``: the sliding window it ran with; None: the config's. ``tokens`` (P, K): the
    likeliest next tokens after each of the last P positions, likeliest first (the smaller id first if equal).
    ``logits`` (P, K): their logits. ``log_sum`` (P,).
    """

    ids: TokenIds
    window: int | None
    tokens: NDArray[np.int64]
    logits: Logits
    log_sum: Logits

    def to_json(self) -> dict[str, Any]:
        """``tokens``, ``logits`` and ``log_sum``, numbers with the digits of float32; without the prompt."""
        return {
            "tokens": self.tokens.tolist(),
            "logits": [[_shortest(value) for value in row] for row in self.logits],
            "log_sum": [_shortest(value) for value in self.log_sum],
        }

    @classmethod
    def from_json(cls, ids: list[int], window: int | None, content: Mapping[str, Any]) -> ReferenceLogits:
        tokens, logits = np.array(content["tokens"], np.int64), np.array(content["logits"], np.float32)
        return cls(np.array(ids, np.int64), window, tokens, logits, np.array(content["log_sum"], np.float32))


ReferencePair = tuple[ReferenceLogits, ReferenceLogits]
"""The reference logits of source and candidate."""


def _shortest(value: np.float32) -> float:
    """The shortest decimal number that is this value in float32."""
    return float(str(np.float32(value)))


class TopLogits:
    """Call ``add`` with every slice of the vocabulary once, in order; then read ``tokens``, ``logits``, ``log_sum``."""

    def __init__(self, positions: int, count: int = TOKENS) -> None:
        self.count = count
        self.tokens: NDArray[np.int64] = np.empty((positions, 0), np.int64)
        self.logits: Logits = np.empty((positions, 0), np.float32)
        self._max = np.full(positions, -np.inf)
        self._total = np.zeros(positions)

    def add(self, first: int, logits: Logits) -> None:
        """Logits of the tokens from ``first`` on, float32 (P, slice)."""
        slice_tokens = np.broadcast_to(first + np.arange(logits.shape[1]), logits.shape)
        tokens = np.concatenate([self.tokens, slice_tokens], axis=1)
        values = np.concatenate([self.logits, logits], axis=1)
        best = np.argsort(-values, axis=1, kind="stable")[:, : self.count]  # stable: smaller ids first
        self.tokens, self.logits = np.take_along_axis(tokens, best, 1), np.take_along_axis(values, best, 1)
        with np.errstate(invalid="ignore", over="ignore"):
            wide = logits.astype(np.float64)
            largest = np.maximum(self._max, wide.max(axis=1))
            self._total = self._total * np.exp(self._max - largest) + np.exp(wide - largest[:, None]).sum(axis=1)
            self._max = largest

    @property
    def log_sum(self) -> Logits:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self._max + np.log(self._total)).astype(np.float32)


class ReferenceCollector:
    """Collects both sides' reference logits from the slices of the vocabulary of a comparison of ``ids`` (B, T)."""

    def __init__(
        self, ids: TokenIds, configs: tuple[Gemma2Config, Gemma2Config], windows: tuple[int, int] | None
    ) -> None:
        self.ids = ids[0, : prompt_length(ids.shape[1], configs)]
        self.windows = windows
        self.positions = slice(max(len(self.ids) - POSITIONS, 0), len(self.ids))
        count = self.positions.stop - self.positions.start
        self.sides = TopLogits(count), TopLogits(count)

    def add(self, first: int, source: Logits, candidate: Logits) -> None:
        """Logits of the tokens from ``first`` on, both float32 (B, T, slice)."""
        for side, logits in zip(self.sides, (source, candidate), strict=True):
            side.add(first, logits[0, self.positions])

    def finish(self) -> ReferencePair:
        source, candidate = (
            ReferenceLogits(self.ids, window, side.tokens, side.logits, side.log_sum)
            for side, window in zip(self.sides, self.windows or (None, None), strict=True)
        )
        return source, candidate


def prompt_length(tokens: int, configs: tuple[Gemma2Config, ...]) -> int:
    """Number of tokens to keep of a prompt: the first ones, or all if later tokens change earlier positions."""
    needs_all = any(
        config.use_bidirectional_attention or config.rope_parameters["rope_type"] in ("dynamic", "longrope")
        for config in configs
    )
    return tokens if needs_all else min(tokens, PROMPT_TOKENS)


def recompute(
    checkpoint: Checkpoint,
    reference: ReferenceLogits,
    *,
    threads: int | None = None,
    advance: Advance | None = None,
) -> ReferenceLogits:
    """``checkpoint``'s logits for the prompt and the tokens of ``reference``."""
    from gemma2tool.reference.streaming import StreamedForward, use_threads

    positions, count = reference.tokens.shape
    length = len(reference.ids)
    logits = np.full((positions, count), np.nan, np.float32)
    top = TopLogits(positions)

    def on_input(name: str, _: object) -> None:
        if advance is not None:
            advance(checkpoint.tensors[name].nbytes, name)

    with use_threads(threads):
        forward = StreamedForward(checkpoint, reference.ids[None], sliding_window=reference.window, on_input=on_input)
        for first, last, block in forward.vocabulary_slices(length - positions, length):
            values = block[0].float().cpu().numpy()
            top.add(first, values)
            row, column = np.nonzero((reference.tokens >= first) & (reference.tokens < last))
            logits[row, column] = values[row, reference.tokens[row, column] - first]
    return ReferenceLogits(reference.ids, reference.window, reference.tokens, logits, top.log_sum)
