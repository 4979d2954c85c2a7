"""Both checkpoints' float32 logits on the same token ids, layer by layer side by side.

The prompt must be longer than the sliding window, or a wrong window cannot show: where it is not, both sides run with a
smaller window, and the candidate's stays as much larger or smaller than the source's as its config has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma2tool.errors import UsageError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import SLIDING, Gemma2Config
from gemma2tool.reference.streaming import OnInput, StreamedForward, side_by_side, use_threads
from gemma2tool.verify.measurements import Drift
from gemma2tool.verify.metrics import LogitComparison, LogitMetrics
from gemma2tool.verify.tensors import Advance

DEFAULT_TOKENS = 64


@dataclass(frozen=True)
class LogitRun:
    """What was run and what came out.

    ``ids``: the prompts, int64 (B, T). ``windows``: the sliding windows that source and candidate ran with; None where
    no layer slides.
    """

    metrics: LogitMetrics
    ids: np.ndarray
    windows: tuple[int, int] | None
    shrunk: bool
    drift: Drift


def default_ids(config: Gemma2Config, tokens: int = DEFAULT_TOKENS) -> np.ndarray:
    """A prompt that is the same everywhere: bos, then pseudo-random tokens (splitmix64) of the whole vocabulary; int
    (1, tokens)."""
    tokens = min(tokens, config.max_position_embeddings)
    mask, ids = 2**64 - 1, []
    for index in range(1, tokens + 1):
        state = index * 0x9E3779B97F4A7C15 & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        ids.append((state ^ state >> 31) % config.vocab_size)
    if config.bos_token_id is not None and ids:
        ids[0] = config.bos_token_id
    return np.array([ids], np.int64)


def windows_for(source: Gemma2Config, candidate: Gemma2Config, tokens: int) -> tuple[int, int] | None:
    """The sliding windows to run both with, so that ``tokens`` go past them; None where the source has no sliding
    layer."""
    if source.sliding_window is None or candidate.sliding_window is None or SLIDING not in source.layer_types:
        return None
    if source.sliding_window < tokens:
        return source.sliding_window, candidate.sliding_window
    small = max(tokens // 4, 1)
    return small, max(small + candidate.sliding_window - source.sliding_window, 1)


def compare_logits(
    source: Checkpoint,
    candidate: Checkpoint,
    ids: np.ndarray,
    *,
    atol: float = 0.0,
    rtol: float = 0.0,
    threads: int | None = None,
    advance: Advance | None = None,
) -> LogitRun:
    """Run both checkpoints on ``ids``, int (T,) or (B, T), in float32, and compare all positions' logits.

    Peak memory: both sides' activations and a slice of the vocabulary projection, whatever the size of the models.
    Raises ``UsageError`` for ids that the models cannot take.
    """
    ids = np.asarray(ids)
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
        raise UsageError(
            "ids.shape", f"token ids are {ids.dtype} of shape {ids.shape}; integers of shape (T,) or (B, T) are needed"
        )
    ids = ids.astype(np.int64)
    batch, tokens = ids.shape
    windows = windows_for(source.config, candidate.config, tokens)
    ours_window, theirs_window = windows or (None, None)
    ours_read, theirs_read = (_counting(each, advance) for each in (source, candidate))
    with use_threads(threads):
        ours = StreamedForward(source, ids, sliding_window=ours_window, on_input=ours_read)
        theirs = StreamedForward(candidate, ids, sliding_window=theirs_window, on_input=theirs_read)
        depths = list(side_by_side(ours, theirs))
        following = np.concatenate([ids[:, 1:], np.full((batch, 1), -1)], axis=1).reshape(-1)
        comparison = LogitComparison(ids.size, following, atol=atol, rtol=rtol)
        for (first, _, a), (_, _, b) in zip(ours.vocabulary_slices(), theirs.vocabulary_slices(), strict=True):
            comparison.add(first, *(logits.flatten(0, 1).cpu().numpy() for logits in (a, b)))
    shrunk = windows is not None and windows[0] != source.config.sliding_window
    columns = ("relative", "reference_rms", "candidate_rms", "largest")
    drift = Drift(*(tuple(getattr(depth, name) for depth in depths) for name in columns))
    return LogitRun(comparison.finish(), ids, windows, shrunk, drift)


def _counting(checkpoint: Checkpoint, advance: Advance | None) -> OnInput | None:
    """Tell ``advance`` of every weight as the forward pass comes to it."""
    if advance is None:
        return None
    return lambda name, _: advance(checkpoint.tensors[name].nbytes, name)
