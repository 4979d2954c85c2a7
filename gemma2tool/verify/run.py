"""``verify``: a candidate against its source, cheapest questions first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from numpy.typing import ArrayLike

from gemma2tool.model.checkpoint import Checkpoint, unchanged
from gemma2tool.model.format_facts import Rounding
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.model.names import HEAD
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.model.tied_head import with_tied_head
from gemma2tool.verify import gate_results
from gemma2tool.verify.chosen import Chosen, only_beyond_chosen_limits, said_as_chosen
from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.compare.completeness import compare_names, is_comparable
from gemma2tool.verify.compare.config import compare_configs
from gemma2tool.verify.compare.consumers import assumptions
from gemma2tool.verify.compare.folding import folded_source
from gemma2tool.verify.compare.measurements import Drift, Measurements, Sample, Tokens, tensor_errors
from gemma2tool.verify.compare.metrics import LogitMetrics
from gemma2tool.verify.compare.passes import pass_count
from gemma2tool.verify.compare.reference_logits import ReferencePair
from gemma2tool.verify.compare.rules import TensorRules, kind_of
from gemma2tool.verify.compare.tensors import compare_tensors, read_through
from gemma2tool.verify.compare.token_ids import TokenIds, as_prompts
from gemma2tool.verify.compare.tokenizer import compare_tokenizers, text_pieces
from gemma2tool.verify.compare.tokenizer_use import implied_stops, put_first
from gemma2tool.verify.compare.tuned_norms import tuned_norms
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.finding import Finding, GateResult
from gemma2tool.verify.gates import GATES, Gates
from gemma2tool.verify.prompts import prompt_for
from gemma2tool.verify.result import Side, Verification

LEVELS = ("completeness", "config", "tokenizer", "tensors", "logits")


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """How a candidate is compared with its source.

    ``ids``: token ids for the logits, int (T,) or (B, T); default: the built-in sample text if the source has a
    tokenizer.model, else 64 pseudo-random ids. ``text``: whether the caller's ids are running text (default: yes). Text
    has a perplexity; other ids run with a sliding window that ends within the prompt. ``gates``: limits that replace
    the defaults, by the names of ``gates.Gates``. ``levels``: which comparisons to make, of ``LEVELS``. ``expected``:
    canonical tensors as the target's own convention gives them, bit for bit (GGUF's w + 1 and back); what they lose is
    reported, not an error. ``rounding``: how the candidate's codes were chosen, on which depends how far single values
    may be off (default: as the candidate says). ``threads``: for
    reading, comparing and the forward passes; the results of comparing tensors do not depend on it. ``chosen``: what
    an option asked to be otherwise than in the source. ``sample``: how many tokens both sides continue the prompt by.
    """

    ids: ArrayLike | None = None
    text: bool | None = None
    gates: Mapping[str, float] = field(default_factory=dict)
    levels: Sequence[str] = LEVELS
    expected: Mapping[str, LazyTensor] = field(default_factory=dict)
    rounding: Rounding | None = None
    threads: int = 1
    progress: Progress | None = None
    chosen: Chosen = field(default_factory=Chosen)
    sample: int = 0


def verify(source: Checkpoint, candidate: Checkpoint, settings: VerifySettings | None = None) -> Verification:
    """Compare ``candidate`` with ``source``.

    Differences are reported, never raised. Raises only for what cannot be read or run, and ``ValueError`` for an
    unknown level.
    """
    settings = settings or VerifySettings()
    unknown = [level for level in settings.levels if level not in LEVELS]
    if unknown:
        raise ValueError(f"unknown levels: {unknown}; levels are {LEVELS}")
    with unchanged(source, candidate):
        return _Run(source, candidate, settings).run()


@dataclass(frozen=True)
class _LogitsResult:
    """What the forward passes give besides their gates."""

    drift: Drift
    tokens: Tokens
    reference: ReferencePair


class _Run:
    """One verification: its inputs, and the results so far."""

    def __init__(self, source: Checkpoint, candidate: Checkpoint, settings: VerifySettings) -> None:
        given, source = source, source if HEAD in candidate.tensors else with_tied_head(source)
        self.has_copied_head = source is not given
        self.original, self.candidate, self.settings = source, candidate, settings
        self.source = source = settings.chosen.source_as_chosen(source, candidate)
        self.rounding: Rounding = settings.rounding or candidate.rounding
        self.common = {
            name: tensor
            for name, tensor in source.tensors.items()
            if name in candidate.tensors and tuple(candidate.tensors[name].shape) == tuple(tensor.shape)
        }
        self.gates: list[GateResult] = []
        self.usual: list[GateResult] = []
        self.chosen: tuple[str, ...] = ()
        self.seconds: dict[str, float] = {}
        self.comparisons: list[TensorComparison] | None = None
        self.logits: _LogitsResult | None = None
        self.sample: Sample | None = None

    def run(self) -> Verification:
        levels = self.settings.levels
        if "completeness" in levels:
            with self._timed("completeness"):
                self._report(self._compare_names())
        if "config" in levels:
            with self._timed("config"):
                self._report(self._compare_configs())
        if "tokenizer" in levels:
            with self._timed("tokenizer"):
                self._report(compare_tokenizers(self.original, self.candidate))
        if "tensors" in levels:
            with self._timed("tensors"):
                self.comparisons = self._compare_tensors()
            self.gates.append(gate_results.tensors_gate(self.comparisons))
            self._check_unchanged()
        kind = kind_of(self.common, self.candidate.tensors, self.settings.expected.keys(), self.comparisons)
        limits = GATES[kind].overridden(self.settings.gates)
        if "logits" in levels:
            with self._timed("logits"):
                self._compare_logits(kind, limits)
        if self.logits is not None and self.settings.sample and not self.source.config.use_bidirectional_attention:
            with self._timed("sample"):
                self.sample = self._continue_prompt(self.logits.tokens)
        self._check_unchanged()
        causes: tuple[Cause, ...] = ()
        own_limits = only_beyond_chosen_limits(self.gates, self.usual, self.comparisons or (), self.settings.gates)
        if own_limits:
            self.gates = [said_as_chosen(gate, kind) for gate in self.gates]
        elif any(gate.failed for gate in self.gates):
            with self._timed("diagnosis"):
                causes = self._diagnose(kind)
        sides = Side.of(self.original), Side.of(self.candidate)
        return Verification(
            *sides, kind, tuple(self.gates), self.seconds, causes, self._measurements(), self.chosen, own_limits
        )

    def _check_unchanged(self) -> None:
        """Refuse files that changed: neither a verdict nor a cause would be of any version of them."""
        self.original.check_unchanged()
        self.candidate.check_unchanged()

    def _report(self, gate: GateResult) -> None:
        """Add a gate's result, with chosen differences as such."""
        reported = self.settings.chosen.reported(gate)
        pairs = zip(reported.findings, gate.findings, strict=True)
        self.chosen += tuple(str(new.subject) for new, old in pairs if new is not old)
        self.gates.append(reported)

    @contextmanager
    def _timed(self, level: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[level] = time.perf_counter() - start

    def _compare_names(self) -> GateResult:
        gate = compare_names(self.original, self.candidate)
        if not self.has_copied_head:
            return gate
        message = "the source's equals its embedding, which the candidate uses for both"
        return replace(gate, findings=(*gate.findings, Finding(gate.name, "note", HEAD, message)))

    def _compare_configs(self) -> GateResult:
        return compare_configs(
            self.original.config,
            self.candidate.config,
            cannot_represent=self.candidate.facts.cannot_represent,
            assumptions=assumptions(self.candidate),
            implied_stops=(implied_stops(self.original), implied_stops(self.candidate)),
            put_first=put_first(self.original),
        )

    def _compare_tensors(self) -> list[TensorComparison]:
        candidate, settings = self.candidate, self.settings
        rules = TensorRules(
            expected=settings.expected,
            folded=folded_source(self.source, candidate),
            tuned=tuned_norms(self.common, candidate, settings.expected),
            rounding=self.rounding,
            max_relative_rmse=settings.gates.get("rmse"),
        )
        nbytes = sum(candidate.tensors[name].nbytes for name in self.common)
        with progress_or_null(settings.progress, nbytes, "tensors") as bar:
            comparisons = compare_tensors(
                self.common, candidate.tensors, rules, threads=settings.threads, advance=bar.advance
            )
            read_through(candidate.buffers.values())
        return comparisons

    def _compare_logits(self, kind: str, limits: Gates) -> None:
        from gemma2tool.verify.compare.logits import LogitOptions, compare_logits

        source, candidate, settings = self.source, self.candidate, self.settings
        if not is_comparable(source, candidate):
            reason = "the two do not have the same tensors, so no forward pass can be compared"
            self.gates += [GateResult(gate, "skipped", reason) for gate in ("logits", "probe", "distribution")]
            return
        ids, text = self._prompts()
        options = LogitOptions(text=text, atol=limits.logits or 0.0, rtol=limits.logits_rtol or 0.0)
        nbytes = sum(tensor.nbytes for side in (source, candidate) for tensor in side.tensors.values())
        with progress_or_null(
            settings.progress, nbytes * pass_count(ids.shape, source.config), "forward passes"
        ) as bar:
            result = compare_logits(source, candidate, ids, options, threads=settings.threads, advance=bar.advance)
        envelope = None
        comparisons = self.comparisons
        if comparisons and not settings.gates and gate_results.needs_envelope(result.metrics, limits, comparisons):
            envelope = self._noise_envelope(comparisons, ids, text)
        self.gates += gate_results.logits_gates(result, kind, limits, text, envelope)
        if settings.gates:
            self.usual = gate_results.usual_gates(result, kind, text)
        tokens = Tokens.of(result.ids, result.metrics, text, text_pieces(source, result.ids))
        self.logits = _LogitsResult(result.drift, tokens, result.reference)

    def _prompts(self) -> tuple[TokenIds, bool]:
        """The token ids (B, T), and whether they are running text."""
        if self.settings.ids is None:
            return prompt_for(self.source, self.candidate)
        return as_prompts(self.settings.ids), self.settings.text is not False

    def _noise_envelope(self, comparisons: Sequence[TensorComparison], ids: TokenIds, text: bool) -> LogitMetrics:
        """Metrics of the source against itself with noise of the candidate's errors."""
        from gemma2tool.verify.compare.logits import LogitOptions, compare_logits
        from gemma2tool.verify.compare.noise import with_noise

        noisy = with_noise(self.source, comparisons)
        options = LogitOptions(text=text, probe=False)
        return compare_logits(self.source, noisy, ids, options, threads=self.settings.threads).metrics

    def _continue_prompt(self, tokens: Tokens) -> Sample:
        from gemma2tool.verify.compare.sample import continue_prompt

        count, settings = self.settings.sample, self.settings
        with progress_or_null(settings.progress, 2 * count, "sample", unit="tokens") as bar:
            return continue_prompt(
                self.source, self.candidate, tokens.ids, count, threads=settings.threads, advance=bar.advance
            )

    def _diagnose(self, kind: str) -> tuple[Cause, ...]:
        """The known mistakes that explain the failures.

        If they leave something unexplained and a forward pass ran, the place where the two models first diverge is
        added.
        """
        from gemma2tool.verify.diagnosis.diagnose import diagnose
        from gemma2tool.verify.diagnosis.swapped import swapped_arguments

        source, candidate, threads = self.source, self.candidate, self.settings.threads
        swapped = swapped_arguments(source, candidate, self.comparisons or (), threads)
        if swapped is not None:
            return (swapped,)
        causes = diagnose(
            source,
            candidate,
            self.gates,
            self.comparisons,
            expected=self.settings.expected,
            rounding=self.rounding,
            threads=threads,
        )
        explained = {name for cause in causes for name in cause.tensors}
        unexplained = [
            comparison.name
            for comparison in self.comparisons or ()
            if not comparison.ok and comparison.name not in explained
        ]
        if self.logits is None or (causes and not unexplained) or not is_comparable(source, candidate):
            return causes
        from gemma2tool.verify.diagnosis.first_divergence import find_first_divergence

        ids, is_exact = self.logits.tokens.ids, kind == "lossless"
        divergence = find_first_divergence(
            source, candidate, ids, exact=is_exact, suspects=unexplained, threads=threads
        )
        if divergence is None or explained.issuperset(divergence.tensors or ("",)):
            return causes
        return (*causes, divergence)

    def _measurements(self) -> Measurements:
        tensors = None if self.comparisons is None else tensor_errors(self.comparisons)
        if self.logits is None:
            return Measurements(tensors)
        return Measurements(tensors, self.logits.drift, self.logits.tokens, self.logits.reference, self.sample)
