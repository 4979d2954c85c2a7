"""Both checkpoints' float32 logits for the same token ids, computed layer by layer side by side.

Two features have no effect on short prompts of ordinary text: the end of the sliding window, and the soft cap of the
attention scores. Token ids that are not text run with a window smaller than the prompt if the models' own is larger.
Text runs with the models' own window, so that its perplexity is the models'. The first prompt also runs as the *probe*,
in the same pass over the weights: with the smaller window, positions spread over the whole context, and attention
scores amplified up to the cap. The candidate's reduced window differs from the source's by as much as its own does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

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
from gemma2tool.verify.compare import passes
from gemma2tool.verify.compare.measurements import Drift
from gemma2tool.verify.compare.metrics import LogitComparison, LogitMetrics
from gemma2tool.verify.compare.reference_logits import ReferenceCollector, ReferencePair
from gemma2tool.verify.compare.token_ids import DEFAULT_TOKENS, TokenIds, as_prompts

_DEFAULT_CAP = 50.0
"""The size that scores are amplified to if neither side has a cap: Gemma 2's."""

Windows = tuple[int, int]
"""The sliding windows of source and candidate."""


@dataclass(frozen=True)
class Probe:
    """The probe's inputs and result.

    ``windows``: None if no layer slides. ``last_position``: position of the last token. ``cap``: the RMS of the
    amplified scores. ``gains``: the factor of each layer's scores.
    """

    metrics: LogitMetrics
    windows: Windows | None
    last_position: int
    cap: float
    gains: tuple[float, ...]


@dataclass(frozen=True)
class LogitRun:
    """The inputs and results of ``compare_logits``.

    ``ids``: the prompts (B, T). ``windows``: the sliding windows they ran with; None if no layer slides.
    ``window_reduced``: whether they are smaller than the source's own. ``probe``: None if not requested. ``reference``:
    a few logits of the first prompt, of both sides.
    """

    metrics: LogitMetrics
    ids: TokenIds
    windows: Windows | None
    window_reduced: bool
    drift: Drift
    probe: Probe | None
    reference: ReferencePair


@dataclass(frozen=True)
class LogitOptions:
    """``text``: the ids are running text. ``probe``: run the probe. ``atol``, ``rtol``: as for ``LogitComparison``."""

    text: bool = False
    probe: bool = True
    atol: float = 0.0
    rtol: float = 0.0


def compare_logits(
    source: Checkpoint,
    candidate: Checkpoint,
    ids: TokenIds,
    options: LogitOptions = LogitOptions(),
    *,
    threads: int | None = None,
    advance: Advance | None = None,
) -> LogitRun:
    """Run both checkpoints on ``ids``, int (T,) or (B, T), in float32, and compare the logits of all positions.

    Peak memory: both sides' activations (see ``passes``) and a slice of the vocabulary projection, for models of
    any size. Raises ``UsageError`` for ids outside the vocabulary or beyond max_position_embeddings.
    """
    ids = as_prompts(ids)
    tokens = ids.shape[1]
    pair = _Pair(source, candidate, options, advance)
    windows = reduced_windows(source.config, candidate.config, tokens)
    if options.text:
        windows = _own_windows(source.config, candidate.config)
    collector = ReferenceCollector(ids, (source.config, candidate.config), windows)
    probe_shares_pass = options.probe and tokens <= passes.PROBE_SHARED_TOKENS
    step = passes.prompts_per_pass(source.config, tokens)
    metrics: list[LogitMetrics] = []
    differences: list[tuple[int, list[HiddenDifference]]] = []
    probe = None
    with use_threads(threads):
        for first in range(0, len(ids), step):
            prompts = ids[first : first + step]
            is_first = first == 0
            result = pair.run(
                prompts, windows, ids[:1] if probe_shares_pass and is_first else None, collector if is_first else None
            )
            metrics.append(result.metrics)
            differences.append((prompts.size, result.differences))
            probe = result.probe or probe
        if options.probe and not probe_shares_pass:
            probe = pair.run_probe(ids[:1, :DEFAULT_TOKENS])
    reduced = windows is not None and windows[0] != source.config.sliding_window
    drift = _drift(differences)
    return LogitRun(LogitMetrics.concatenated(metrics), ids, windows, reduced, drift, probe, collector.finish())


def _own_windows(source: Gemma2Config, candidate: Gemma2Config) -> Windows | None:
    """The configs' windows; None if the source has no sliding layer, or one of them no window."""
    if source.sliding_window is None or candidate.sliding_window is None or SLIDING not in source.layer_types:
        return None
    return source.sliding_window, candidate.sliding_window


def reduced_windows(source: Gemma2Config, candidate: Gemma2Config, tokens: int) -> Windows | None:
    """The sliding windows to run both sides with so that ``tokens`` extend past them; None if no layer slides."""
    own = _own_windows(source, candidate)
    if own is None or own[0] < tokens:
        return own
    reduced = max(tokens // 4, 1)
    return reduced, max(reduced + own[1] - own[0], 1)


@dataclass(frozen=True)
class _PassResult:
    """What one pass gives; ``differences`` are of the hidden states of the prompts without the probe."""

    metrics: LogitMetrics
    differences: list[HiddenDifference]
    probe: Probe | None


@dataclass(frozen=True)
class _ProbeInput:
    """The probe as one more row of a batch: its ids (1, T), positions (1, T), windows, and amplifier."""

    ids: TokenIds
    positions: torch.Tensor
    windows: Windows | None
    amplifier: Amplifier

    def result(self, metrics: LogitMetrics) -> Probe:
        gains = tuple(self.amplifier.gains[layer] for layer in sorted(self.amplifier.gains))
        return Probe(metrics, self.windows, int(self.positions[-1, -1]), self.amplifier.target, gains)


@dataclass(frozen=True)
class _Pair:
    """The two checkpoints, for passes over both at once."""

    source: Checkpoint
    candidate: Checkpoint
    options: LogitOptions
    advance: Advance | None

    def run(
        self,
        ids: TokenIds,
        windows: Windows | None,
        probe_ids: TokenIds | None,
        collector: ReferenceCollector | None,
    ) -> _PassResult:
        """Run ``ids`` (B, T) with ``windows``, and ``probe_ids`` (1, T) as the probe.

        ``collector`` receives the logits of ``ids``.
        """
        batch = len(ids)
        probe = None if probe_ids is None else self._probe_input(probe_ids, batch)
        source, candidate = self._forwards(ids, windows, probe)
        differences = list(compare_hidden_states(source, candidate, prompts=batch))
        comparison = self._comparison(ids)
        probe_comparison = None if probe is None else self._comparison(probe.ids)
        for (first, _, source_slice), (_, _, candidate_slice) in zip(
            source.vocabulary_slices(), candidate.vocabulary_slices(), strict=True
        ):
            source_logits, candidate_logits = source_slice.cpu().numpy(), candidate_slice.cpu().numpy()
            if collector is not None:
                collector.add(first, source_logits, candidate_logits)
            comparison.add(first, _flat(source_logits[:batch]), _flat(candidate_logits[:batch]))
            if probe_comparison is not None:
                probe_comparison.add(first, _flat(source_logits[batch:]), _flat(candidate_logits[batch:]))
        probe_result = None
        if probe is not None and probe_comparison is not None:
            probe_result = probe.result(probe_comparison.finish())
        return _PassResult(comparison.finish(), differences, probe_result)

    def run_probe(self, ids: TokenIds) -> Probe:
        """Run ``ids`` (1, T) as the probe alone."""
        probe = self._probe_input(ids, 0)
        source, candidate = self._forwards(ids[:0], None, probe)
        for _ in zip(source.hidden_states(), candidate.hidden_states(), strict=True):
            pass  # both advance in step, so that they share the amplifier's gains
        comparison = self._comparison(ids)
        for (first, _, source_slice), (_, _, candidate_slice) in zip(
            source.vocabulary_slices(), candidate.vocabulary_slices(), strict=True
        ):
            comparison.add(first, _flat(source_slice.cpu().numpy()), _flat(candidate_slice.cpu().numpy()))
        return probe.result(comparison.finish())

    def _probe_input(self, ids: TokenIds, row: int) -> _ProbeInput:
        """The probe as row ``row`` of a batch."""
        configs = self.source.config, self.candidate.config
        cap = configs[0].attn_logit_softcapping or configs[1].attn_logit_softcapping or _DEFAULT_CAP
        tokens = ids.shape[1]
        windows = reduced_windows(*configs, tokens)
        return _ProbeInput(ids, _spread_positions(*configs, tokens), windows, Amplifier(slice(row, None), cap))

    def _forwards(
        self, ids: TokenIds, windows: Windows | None, probe: _ProbeInput | None
    ) -> tuple[StreamedForward, StreamedForward]:
        batch, tokens = ids.shape
        rows, positions = ids, torch.arange(tokens).expand(batch, -1)
        if probe is not None:
            rows, positions = np.concatenate([rows, probe.ids]), torch.cat([positions, probe.positions])

        def forward(checkpoint: Checkpoint, side: int) -> StreamedForward:
            row_windows = [windows[side]] * batch if windows else []
            if probe is not None and probe.windows:
                row_windows.append(probe.windows[side])
            is_uniform = len(set(row_windows)) == 1
            return StreamedForward(
                checkpoint,
                rows,
                sliding_window=(row_windows[0] if is_uniform else row_windows) if row_windows else None,
                position_ids=positions,
                amplifier=None if probe is None else probe.amplifier,
                on_input=_counter(checkpoint, self.advance),
            )

        return forward(self.source, 0), forward(self.candidate, 1)

    def _comparison(self, ids: TokenIds) -> LogitComparison:
        following = np.concatenate([ids[:, 1:], np.full((len(ids), 1), -1)], axis=1).reshape(-1)
        return LogitComparison(ids.size, following, atol=self.options.atol, rtol=self.options.rtol)


def _flat(
    logits: np.ndarray[tuple[int, int, int], np.dtype[np.float32]],
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """(B, T, V) as (B * T, V)."""
    return logits.reshape(-1, logits.shape[-1])


def _spread_positions(source: Gemma2Config, candidate: Gemma2Config, tokens: int) -> torch.Tensor:
    """Positions (1, T) from the first to the last that both models have, so that distant rotary angles meet.

    Consecutive positions if a rotary scaling depends on the longest position of a batch: spread ones would change the
    other prompts.
    """
    last = min(source.max_position_embeddings, candidate.max_position_embeddings) - 1
    kinds = {config.rope_parameters["rope_type"] for config in (source, candidate)}
    if kinds & {"dynamic", "longrope"} or last < tokens:
        return torch.arange(tokens)[None]
    return torch.from_numpy(np.linspace(0, last, tokens).round().astype(np.int64))[None]


def _drift(parts: Sequence[tuple[int, list[HiddenDifference]]]) -> Drift:
    """Root mean squares over the tokens of all passes; a pass is its number of tokens and its differences."""
    total = sum(tokens for tokens, _ in parts)
    counts = [tokens for tokens, _ in parts]
    columns: list[list[float]] = [[], [], [], []]
    for differences in zip(*(of_pass for _, of_pass in parts), strict=True):
        rms, source_rms, candidate_rms = (
            (
                sum(
                    tokens * getattr(difference, name) ** 2
                    for tokens, difference in zip(counts, differences, strict=True)
                )
                / total
            )
            ** 0.5
            for name in ("rms", "reference_rms", "candidate_rms")
        )
        relative = rms / source_rms if source_rms else float(rms > 0)
        largest = max(difference.largest for difference in differences)
        for column, value in zip(columns, (relative, source_rms, candidate_rms, largest), strict=True):
            column.append(value)
    return Drift(*(tuple(column) for column in columns))


def _counter(checkpoint: Checkpoint, advance: Advance | None) -> OnInput | None:
    """Calls ``advance`` for every weight that the forward pass reads."""
    if advance is None:
        return None
    return lambda name, _: advance(checkpoint.tensors[name].nbytes, name)
