"""``verify``: a candidate against its source, from the cheap questions to the dear ones."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.verify import gate_results
from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.compare.completeness import comparable, compare_names
from gemma2tool.verify.compare.config import compare_configs
from gemma2tool.verify.compare.consumers import assumptions
from gemma2tool.verify.compare.folding import folded_source
from gemma2tool.verify.compare.measurements import Drift, Measurements, Tokens, tensor_errors
from gemma2tool.verify.compare.reference_logits import Reference
from gemma2tool.verify.compare.tensors import compare_tensors, kind_of, read_through
from gemma2tool.verify.compare.tokenizer import compare_tokenizers, text_pieces
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.finding import GateResult
from gemma2tool.verify.gates import GATES, Gates
from gemma2tool.verify.prompts import prompt_for
from gemma2tool.verify.result import Side, Verification

LEVELS = ("completeness", "config", "tokenizer", "tensors", "logits")


def verify(
    source: Checkpoint,
    candidate: Checkpoint,
    *,
    ids: np.ndarray | None = None,
    text: bool | None = None,
    gates: Mapping[str, float] | None = None,
    levels: Sequence[str] = LEVELS,
    threads: int = 1,
    progress: Progress | None = None,
    expected: Mapping[str, LazyTensor] | None = None,
    weighted: bool | None = None,
) -> Verification:
    """Compare ``candidate`` with ``source``; never raises for a difference, only for what cannot be read or run.

    ``ids``: token ids, int (T,) or (B, T), for the logits; default: a short text of ours where the source has a
    tokenizer.model, else 64 pseudo-random ids. ``text``: whether the caller's ids are running text (default: yes), so that
    perplexity means something; what is not text runs with a sliding window that ends within the prompt. ``gates``: limits that
    replace the defaults, by the names of ``gates.Gates``. ``levels``: which questions to ask, of ``LEVELS``.
    ``expected``: canonical tensors as the target's own convention makes them, bit for bit (GGUF's w + 1 and back); what
    they lose is reported, not judged. ``weighted``: whether an importance matrix steered the quantization, so that
    single values may be far off (default: what the candidate's metadata say under "importance_matrix"). ``threads``:
    for reading, comparing and the forward passes; the tensors' part of the result does not depend on it.
    """
    unknown = [level for level in levels if level not in LEVELS]
    if unknown:
        raise ValueError(f"no such level: {unknown}; levels are {LEVELS}")
    expected = expected or {}
    weighted = bool(candidate.metadata.get("importance_matrix")) if weighted is None else weighted
    results: list[GateResult] = []
    seconds: dict[str, float] = {}
    comparisons: list[TensorComparison] | None = None

    @contextmanager
    def timed(level: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[level] = time.perf_counter() - start

    if "completeness" in levels:
        with timed("completeness"):
            results.append(compare_names(source, candidate))
    if "config" in levels:
        with timed("config"):
            cannot_represent, assumed = candidate.facts.cannot_represent, assumptions(candidate)
            config_gate = compare_configs(
                source.config, candidate.config, cannot_represent=cannot_represent, assumed=assumed
            )
            results.append(config_gate)
    if "tokenizer" in levels:
        with timed("tokenizer"):
            results.append(compare_tokenizers(source, candidate))
    common = {name: tensor for name, tensor in source.tensors.items() if _same_shape(name, tensor, candidate)}
    rmse = None if gates is None else gates.get("rmse")
    if "tensors" in levels:
        with (
            timed("tensors"),
            progress_or_null(progress, sum(candidate.tensors[name].nbytes for name in common), "tensors") as bar,
        ):
            comparisons = compare_tensors(
                common,
                candidate.tensors,
                expected=expected,
                folded=folded_source(source, candidate),
                weighted=weighted,
                rmse=rmse,
                threads=threads,
                advance=bar.advance,
            )
            read_through(candidate.buffers.values())
        results.append(gate_results.tensors(comparisons))
    kind = kind_of(common, candidate.tensors, expected, comparisons)
    limits = GATES[kind].overridden(gates)
    drift = tokens = reference = None
    if "logits" in levels:
        with timed("logits"):
            found, drift, tokens, reference = _logits(
                source, candidate, ids, text, kind, limits, bool(gates), comparisons, threads, progress
            )
            results += found
    causes: tuple[Cause, ...] = ()
    if any(gate.failed for gate in results):
        with timed("diagnosis"):
            run_ids = None if tokens is None else tokens.ids
            causes = _causes(source, candidate, results, comparisons, expected, weighted, kind, run_ids, threads)
    measured = Measurements(None if comparisons is None else tensor_errors(comparisons), drift, tokens, reference)
    return Verification(side_of(source), side_of(candidate), kind, tuple(results), seconds, causes, measured)


def _causes(
    source: Checkpoint,
    candidate: Checkpoint,
    results: Sequence[GateResult],
    comparisons: list[TensorComparison] | None,
    expected: Mapping[str, LazyTensor],
    weighted: bool,
    kind: str,
    ids: np.ndarray | None,
    threads: int,
) -> tuple[Cause, ...]:
    """The catalogue's answer; where it leaves something open and there was a forward pass, the place where the models part."""
    from gemma2tool.verify.diagnosis.diagnose import diagnose

    causes = diagnose(source, candidate, results, comparisons, expected=expected, weighted=weighted, threads=threads)
    told = {name for cause in causes for name in cause.tensors}
    open_questions = [each.name for each in comparisons or () if not each.ok and each.name not in told]
    if ids is not None and (open_questions or not causes) and comparable(source, candidate):
        from gemma2tool.verify.diagnosis.first_divergence import find_first_divergence

        parting = find_first_divergence(
            source, candidate, ids, exact=kind == "lossless", suspects=open_questions, threads=threads
        )
        if parting is not None and not told.issuperset(parting.tensors or ("",)):
            causes = (*causes, parting)
    return causes


def _logits(
    source: Checkpoint,
    candidate: Checkpoint,
    ids: np.ndarray | None,
    text: bool | None,
    kind: str,
    limits: Gates,
    overridden: bool,
    comparisons: list[TensorComparison] | None,
    threads: int,
    progress: Progress | None,
) -> tuple[list[GateResult], Drift | None, Tokens | None, Reference | None]:
    from gemma2tool.verify.compare.logits import as_prompts, compare_logits, passes

    if not comparable(source, candidate):
        why = "the two do not hold the same tensors, so no forward pass can be compared"
        return [GateResult(gate, "skipped", why) for gate in ("logits", "probe", "distribution")], None, None, None
    is_text = True if text is None else text
    if ids is None:
        ids, is_text = prompt_for(source, candidate)
    ids = as_prompts(ids)
    nbytes = sum(each.nbytes for side in (source, candidate) for each in side.tensors.values())
    with progress_or_null(progress, nbytes * passes(ids, source.config), "forward passes") as bar:
        run = compare_logits(
            source,
            candidate,
            ids,
            text=is_text,
            atol=limits.logits or 0.0,
            rtol=limits.logits_rtol or 0.0,
            threads=threads,
            advance=bar.advance,
        )
    envelope = None
    if comparisons and not overridden and gate_results.wants_envelope(run.metrics, limits, comparisons):
        from gemma2tool.verify.compare.noise import with_noise

        noisy = with_noise(source, comparisons)
        envelope = compare_logits(source, noisy, ids, text=is_text, probe=False, threads=threads).metrics
    pieces = text_pieces(source.assets, run.ids)
    results = gate_results.logits(run, kind, limits, is_text, envelope)
    return results, run.drift, Tokens.of(run.ids, run.metrics, is_text, pieces), run.reference


def _same_shape(name: str, tensor: LazyTensor, candidate: Checkpoint) -> bool:
    return name in candidate.tensors and tuple(candidate.tensors[name].shape) == tuple(tensor.shape)


def side_of(checkpoint: Checkpoint) -> Side:
    """A checkpoint as a result names it."""
    stored: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        stored[tensor.stored] += tensor.size
    nbytes = sum(path.stat().st_size for path in checkpoint.files)
    return Side(str(checkpoint.path), checkpoint.format, dict(stored), nbytes)
