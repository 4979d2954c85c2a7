"""Both checkpoints' float32 logits on the same token ids, layer by layer side by side.

Two things that short prompts of ordinary text never reach are made to matter: the end of the sliding window, and the soft
cap of the attention scores. Token ids that are not text run with a window smaller than the prompt where the models' own is
larger; text runs with the models' own, so that perplexity means what it says. And the first prompt runs once more as the
*probe*, in the same pass over the weights: with the smaller window, positions spread over the whole context, and attention
scores amplified up to the cap. The candidate's smaller window stays as much larger or smaller than the source's as its
config has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gemma2tool.errors import UsageError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.config_fields import SLIDING
from gemma2tool.model.progress import Advance
from gemma2tool.reference.amplify import Amplifier
from gemma2tool.reference.streaming import (
    HiddenDifference,
    OnInput,
    StreamedForward,
    compare_hidden_states,
    use_threads,
)
from gemma2tool.verify.compare.measurements import Drift
from gemma2tool.verify.compare.metrics import LogitComparison, LogitMetrics
from gemma2tool.verify.compare.reference_logits import Collector, Reference

DEFAULT_TOKENS = 64
PASS_BYTES = 64 << 20
"""Prompts go through the weights together as long as their feed-forward activations, (B, T, F) in float32, fit here; longer ones alone."""
PROBE_BESIDE = 256
"""The probe is the whole first prompt, up to this length; of a longer one it is the first ``DEFAULT_TOKENS``, in a pass of its
own."""

_DEFAULT_CAP = 50.0  # what scores are amplified to where neither side caps them: Gemma 2's own


@dataclass(frozen=True)
class Probe:
    """What the probe was and what came out.

    ``windows``: those that source and candidate ran with; None where no layer slides. ``last_position``: of the last token.
    ``cap``: the size that amplified scores have (RMS), ``gains``: what each layer's scores were multiplied by for that.
    """

    metrics: LogitMetrics
    windows: tuple[int, int] | None
    last_position: int
    cap: float
    gains: tuple[float, ...]


@dataclass(frozen=True)
class LogitRun:
    """What was run and what came out.

    ``ids``: the prompts, int64 (B, T). ``windows``: the sliding windows that source and candidate ran with; None where no
    layer slides. ``shrunk``: whether those are smaller than the source's own. ``probe``: None where it was not asked for.
    ``reference``: a few logits of the first prompt, of source and candidate.
    """

    metrics: LogitMetrics
    ids: np.ndarray
    windows: tuple[int, int] | None
    shrunk: bool
    drift: Drift
    probe: Probe | None = None
    reference: Reference | None = None


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
    if not _slide(source, candidate):
        return None
    if source.sliding_window < tokens:
        return source.sliding_window, candidate.sliding_window
    small = max(tokens // 4, 1)
    return small, max(small + candidate.sliding_window - source.sliding_window, 1)


def prompts_per_pass(config: Gemma2Config, tokens: int) -> int:
    """How many prompts of ``tokens`` go through the weights together."""
    return max(PASS_BYTES // (4 * config.intermediate_size * tokens), 1)


def passes(ids: np.ndarray, config: Gemma2Config, probe: bool = True) -> int:
    """How often ``compare_logits`` goes over all weights of both for ``ids`` (B, T)."""
    batch, tokens = ids.shape
    return -(-batch // prompts_per_pass(config, tokens)) + (probe and tokens > PROBE_BESIDE)


def compare_logits(
    source: Checkpoint,
    candidate: Checkpoint,
    ids: np.ndarray,
    *,
    text: bool = False,
    probe: bool = True,
    atol: float = 0.0,
    rtol: float = 0.0,
    threads: int | None = None,
    advance: Advance | None = None,
) -> LogitRun:
    """Run both checkpoints on ``ids``, int (T,) or (B, T), in float32, and compare all positions' logits.

    ``text``: the ids are running text, and run with the models' own windows. ``probe``: run that too. ``atol``, ``rtol``: as
    in ``LogitComparison``. Peak memory: both sides' activations (see ``PASS_BYTES``) and a slice of the vocabulary
    projection, whatever the size of the models. Raises ``UsageError`` for ids that the models cannot take.
    """
    ids = as_prompts(ids)
    batch, tokens = ids.shape
    both = _Both(source, candidate, atol, rtol, advance)
    windows = windows_for(source.config, candidate.config, tokens)
    if text and windows is not None:
        windows = source.config.sliding_window, candidate.config.sliding_window
    collector = Collector(ids, (source.config, candidate.config), windows)
    together = probe and tokens <= PROBE_BESIDE
    step = prompts_per_pass(source.config, tokens)
    found, depths, probed = [], [], None
    with use_threads(threads):
        for first in range(0, batch, step):
            rows = ids[first : first + step]
            extra = ids[:1] if together and first == 0 else None
            metrics, apart, beside = both.run(rows, windows, extra, collector if first == 0 else None)
            found.append(metrics)
            depths.append((rows.size, apart))
            probed = beside or probed
        if probe and not together:
            _, _, probed = both.run(ids[:0, :DEFAULT_TOKENS], windows, ids[:1, :DEFAULT_TOKENS])
    shrunk = windows is not None and windows[0] != source.config.sliding_window
    return LogitRun(LogitMetrics.joined(found), ids, windows, shrunk, _drift(depths), probed, collector.finish())


@dataclass(frozen=True)
class _Both:
    """The two checkpoints, and one pass over them at a time."""

    source: Checkpoint
    candidate: Checkpoint
    atol: float
    rtol: float
    advance: Advance | None

    def run(
        self,
        ids: np.ndarray,
        windows: tuple[int, int] | None,
        extra: np.ndarray | None,
        collector: Collector | None = None,
    ) -> tuple[LogitMetrics | None, list[HiddenDifference], Probe | None]:
        """``ids`` (B, T) with ``windows``, and ``extra`` (1, T) as the probe; ``collector`` sees the logits of the former."""
        batch, tokens = ids.shape
        rows, positions, amplifier = ids, torch.arange(tokens).expand(batch, -1), None
        cap = self.source.config.attn_logit_softcapping or self.candidate.config.attn_logit_softcapping or _DEFAULT_CAP
        small = windows_for(self.source.config, self.candidate.config, tokens)
        if extra is not None:
            rows = np.concatenate([ids, extra])
            positions = torch.cat([positions, _spread(self.source.config, self.candidate.config, tokens)])
            amplifier = Amplifier(slice(batch, None), cap)
        sides = []
        for side, checkpoint in enumerate((self.source, self.candidate)):
            each = [windows[side]] * batch + [small[side]] * (len(rows) - batch) if windows and small else None
            read = _counting(checkpoint, self.advance)
            options = {"sliding_window": _one(each), "position_ids": positions, "amplifier": amplifier}
            sides.append(StreamedForward(checkpoint, rows, on_input=read, **options))
        depths = list(compare_hidden_states(*sides, prompts=batch)) if batch else _run_through(*sides)
        plain, probe = self._comparison(ids), self._comparison(extra)
        for (first, _, a), (_, _, b) in zip(*(each.vocabulary_slices() for each in sides), strict=True):
            if collector is not None:
                collector.add(first, a.cpu().numpy(), b.cpu().numpy())
            for comparison, of in ((plain, slice(0, batch)), (probe, slice(batch, None))):
                if comparison is not None:
                    comparison.add(first, *(logits[of].flatten(0, 1).cpu().numpy() for logits in (a, b)))
        if probe is None:
            return plain.finish(), depths, None
        gains = tuple(amplifier.gains[layer] for layer in sorted(amplifier.gains))
        told = Probe(probe.finish(), small, int(positions[-1, -1]), cap, gains)
        return None if plain is None else plain.finish(), depths, told

    def _comparison(self, ids: np.ndarray | None) -> LogitComparison | None:
        if ids is None or not ids.size:
            return None
        following = np.concatenate([ids[:, 1:], np.full((len(ids), 1), -1)], axis=1).reshape(-1)
        return LogitComparison(ids.size, following, atol=self.atol, rtol=self.rtol)


def as_prompts(ids: np.ndarray) -> np.ndarray:
    """Token ids (T,) or (B, T) as int64 (B, T); ``UsageError`` for anything else."""
    ids = np.asarray(ids)
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
        raise UsageError(
            "ids.shape", f"token ids are {ids.dtype} of shape {ids.shape}; integers of shape (T,) or (B, T) are needed"
        )
    return ids.astype(np.int64)


def _slide(source: Gemma2Config, candidate: Gemma2Config) -> bool:
    windows = source.sliding_window, candidate.sliding_window
    return None not in windows and SLIDING in source.layer_types


def _spread(source: Gemma2Config, candidate: Gemma2Config, tokens: int) -> torch.Tensor:
    """Positions (1, T) from the first to the last that both models have, so that rotary angles far apart meet.

    Consecutive ones where a rotary scaling looks at the longest position of a batch: it would change the other prompts too.
    """
    last = min(source.max_position_embeddings, candidate.max_position_embeddings) - 1
    kinds = {config.rope_parameters["rope_type"] for config in (source, candidate)}
    if kinds & {"dynamic", "longrope"} or last < tokens:
        return torch.arange(tokens)[None]
    return torch.from_numpy(np.linspace(0, last, tokens).round().astype(np.int64))[None]


def _one(windows: Sequence[int] | None) -> int | Sequence[int] | None:
    return windows[0] if windows and len(set(windows)) == 1 else windows


def _run_through(source: StreamedForward, candidate: StreamedForward) -> list[HiddenDifference]:
    """Both passes in step, for the logits alone."""
    for _ in zip(source.hidden_states(), candidate.hidden_states(), strict=True):
        pass
    return []


def _drift(passes: Sequence[tuple[int, list[HiddenDifference]]]) -> Drift:
    """Root mean squares over all passes' tokens."""
    total = sum(tokens for tokens, _ in passes)
    columns: list[list[float]] = [[], [], [], []]
    for depth in zip(*(depths for _, depths in passes), strict=True):
        weighted = list(zip((tokens for tokens, _ in passes), depth, strict=True))
        apart, ours, theirs = (
            (sum(tokens * getattr(each, name) ** 2 for tokens, each in weighted) / total) ** 0.5
            for name in ("rms", "reference_rms", "candidate_rms")
        )
        relative = apart / ours if ours else float(apart > 0)
        largest = max(each.largest for each in depth)
        for column, value in zip(columns, (relative, ours, theirs, largest), strict=True):
            column.append(value)
    return Drift(*(tuple(column) for column in columns))


def _counting(checkpoint: Checkpoint, advance: Advance | None) -> OnInput | None:
    """Tell ``advance`` of every weight as the forward pass comes to it."""
    if advance is None:
        return None
    return lambda name, _: advance(checkpoint.tensors[name].nbytes, name)
