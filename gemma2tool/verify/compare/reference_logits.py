"""A few logits that stand for a checkpoint: the likeliest tokens after the last positions of one prompt.

They come out of the forward pass that a verification makes anyway, and let another machine check the checkpoint later without
its source: it runs the same prompt and looks at the same tokens. Their sum over the vocabulary (``log_sum``, the logarithm of
the sum of all exponentials) holds the other logits, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config

PROMPT_TOKENS = 256
"""The prompt is the first one verified with, or as much of its beginning: every machine gives these the same bits with any
number of threads."""
POSITIONS = 8
TOKENS = 8


@dataclass(frozen=True)
class ReferenceLogits:
    """Logits of one side, float32.

    ``ids`` (T,): the prompt. ``window``: the sliding window it ran with; None: the config's own. ``tokens`` (P, K): the
    likeliest next tokens after each of the prompt's last P positions, likeliest first (the smaller id where equal).
    ``logits`` (P, K): theirs; ``log_sum`` (P,).
    """

    ids: np.ndarray
    window: int | None
    tokens: np.ndarray
    logits: np.ndarray
    log_sum: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """``tokens``, ``logits``, ``log_sum``, as numbers with the digits that float32 has; the prompt is its owner's to write."""
        return {
            "tokens": self.tokens.tolist(),
            "logits": [[_short(value) for value in row] for row in self.logits],
            "log_sum": [_short(value) for value in self.log_sum],
        }

    @classmethod
    def from_json(cls, ids: list[int], window: int | None, content: Mapping[str, Any]) -> ReferenceLogits:
        tokens, logits = np.array(content["tokens"], np.int64), np.array(content["logits"], np.float32)
        return cls(np.array(ids, np.int64), window, tokens, logits, np.array(content["log_sum"], np.float32))


Reference = tuple[ReferenceLogits, ReferenceLogits]
"""Of a source and of what was made of it."""


def _short(value: np.float32) -> float:
    return float(str(np.float32(value)))


class TopLogits:
    """Feed with ``add`` every slice of the vocabulary once, in order; then ``tokens``, ``logits`` and ``log_sum``."""

    def __init__(self, positions: int, count: int = TOKENS) -> None:
        self.count = count
        self.tokens = np.empty((positions, 0), np.int64)
        self.logits = np.empty((positions, 0), np.float32)
        self._max = np.full(positions, -np.inf)
        self._total = np.zeros(positions)

    def add(self, first: int, logits: np.ndarray) -> None:
        """Logits of tokens ``first`` onwards, float32 (P, slice)."""
        tokens = np.broadcast_to(first + np.arange(logits.shape[1]), logits.shape)
        tokens = np.concatenate([self.tokens, tokens], axis=1)
        values = np.concatenate([self.logits, logits], axis=1)
        best = np.argsort(-values, axis=1, kind="stable")[:, : self.count]  # stable: smaller ids first
        self.tokens, self.logits = np.take_along_axis(tokens, best, 1), np.take_along_axis(values, best, 1)
        with np.errstate(invalid="ignore", over="ignore"):
            wide = logits.astype(np.float64)
            largest = np.maximum(self._max, wide.max(axis=1))
            self._total = self._total * np.exp(self._max - largest) + np.exp(wide - largest[:, None]).sum(axis=1)
            self._max = largest

    @property
    def log_sum(self) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self._max + np.log(self._total)).astype(np.float32)


class Collector:
    """Both sides' reference logits, out of the slices of the vocabulary that a comparison of ``ids`` (B, T) goes through."""

    def __init__(
        self, ids: np.ndarray, configs: tuple[Gemma2Config, Gemma2Config], windows: tuple[int, int] | None
    ) -> None:
        self.ids = ids[0, : prompt_length(ids.shape[1], configs)]
        self.windows = windows
        self.positions = slice(max(len(self.ids) - POSITIONS, 0), len(self.ids))
        count = self.positions.stop - self.positions.start
        self.sides = TopLogits(count), TopLogits(count)

    def add(self, first: int, source: np.ndarray, candidate: np.ndarray) -> None:
        """Logits of tokens ``first`` onwards, both float32 (B, T, slice)."""
        for side, logits in zip(self.sides, (source, candidate), strict=True):
            side.add(first, logits[0, self.positions])

    def finish(self) -> Reference:
        source, candidate = (
            ReferenceLogits(self.ids, window, side.tokens, side.logits, side.log_sum)
            for side, window in zip(self.sides, self.windows or (None, None), strict=True)
        )
        return source, candidate


def prompt_length(tokens: int, configs: tuple[Gemma2Config, ...]) -> int:
    """How much of a prompt to keep: a beginning of it, except where what follows changes what came before."""
    whole = any(
        config.use_bidirectional_attention or config.rope_parameters["rope_type"] in ("dynamic", "longrope")
        for config in configs
    )
    return tokens if whole else min(tokens, PROMPT_TOKENS)


def recompute(
    checkpoint: Checkpoint,
    reference: ReferenceLogits,
    *,
    threads: int | None = None,
    advance: Callable[[int, str], None] | None = None,
) -> ReferenceLogits:
    """``checkpoint``'s own logits for the prompt and the tokens of ``reference``."""
    from gemma2tool.reference.streaming import StreamedForward, use_threads

    positions, count = reference.tokens.shape
    length = len(reference.ids)
    logits = np.full((positions, count), np.nan, np.float32)
    top = TopLogits(positions)

    def read(name: str, _: object) -> None:
        if advance is not None:
            advance(checkpoint.tensors[name].nbytes, name)

    with use_threads(threads):
        run = StreamedForward(checkpoint, reference.ids[None], sliding_window=reference.window, on_input=read)
        for first, last, block in run.vocabulary_slices(length - positions, length):
            values = block[0].float().cpu().numpy()
            top.add(first, values)
            row, column = np.nonzero((reference.tokens >= first) & (reference.tokens < last))
            logits[row, column] = values[row, reference.tokens[row, column] - first]
    return ReferenceLogits(reference.ids, reference.window, reference.tokens, logits, top.log_sum)
