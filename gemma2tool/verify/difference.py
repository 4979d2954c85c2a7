"""``diff``: two checkpoints compared with each other, neither of which is the source.

It asks the same questions as ``verify``, by other rules: no type's rounding is allowed for, every value that differs
counts, and measures are taken both ways. Only where a format's own convention changes a value (GGUF stores norms as w +
1) does the other side's value, after the same convention, count as equal; such tensors are listed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from numpy.typing import ArrayLike

from gemma2tool.errors import InputRefused
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.verify.compare.completeness import compare_names, is_comparable
from gemma2tool.verify.compare.config import compare_configs
from gemma2tool.verify.compare.measurements import Drift, depth_name, layer_and_kind
from gemma2tool.verify.compare.passes import pass_count
from gemma2tool.verify.compare.tensor_diff import TensorDifference, compare_values
from gemma2tool.verify.compare.token_ids import as_prompts
from gemma2tool.verify.compare.tokenizer import compare_tokenizers
from gemma2tool.verify.compare.tokenizer_use import implied_stops
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.finding import Finding, GateResult, Sides
from gemma2tool.verify.json_values import json_value, significant
from gemma2tool.verify.result import Side

SCHEMA_VERSION = 1
A_AND_B: Sides = ("A", "B")

Expected = tuple[Mapping[str, LazyTensor], Mapping[str, LazyTensor]]
"""A's tensors as they come back from B's format, and B's as they come back from A's, where these formats change them.
"""

Compared = TypeVar("Compared", contravariant=True)


class _Compare(Protocol[Compared]):
    def __call__(self, source: Compared, candidate: Compared, /, *, sides: Sides) -> GateResult: ...


@dataclass(frozen=True)
class Difference:
    """What two checkpoints have in common, and where they differ.

    - ``parts``: the result of each comparison. "passed" means that no difference was found, "failed" that one was;
      "reported" parts measure how the differences affect the logits.
    - ``tensors``: the tensors that both checkpoints have in the same shape.
    - ``causes``: known mistakes that would turn A into B.
    - ``seconds``: wall time; not part of ``to_json``.
    """

    a: Side
    b: Side
    parts: tuple[GateResult, ...]
    tensors: tuple[TensorDifference, ...] = ()
    drift: Drift | None = None
    causes: tuple[Cause, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    @property
    def same(self) -> bool:
        """Whether no part differs, apart from what the formats' own conventions change."""
        return not any(part.failed for part in self.parts)

    @property
    def verdict(self) -> str:
        if not self.same:
            return "they differ in " + ", ".join(part.name for part in self.parts if part.failed)
        by_convention = [tensor for tensor in self.tensors if tensor.by_convention]
        if not by_convention:
            return "equal values, config and tokenizer, as far as both have them"
        largest = max(tensor.max_abs_difference for tensor in by_convention)
        return (
            f"except for {len(by_convention)} tensors, whose values one side's format changes by its own convention, by"
            f" up to {largest:.3g}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "same": self.same,
            "verdict": self.verdict,
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "parts": [part.to_json() for part in self.parts],
            "tensors": {tensor.name: json_value(tensor.to_json()) for tensor in self.tensors},
            "causes": [json_value(cause.to_json()) for cause in self.causes],
            "drift": None if self.drift is None else _drift_json(self.drift),
        }


def _drift_json(drift: Drift) -> dict[str, Any]:
    content = json_value(drift.to_json())
    return {"a_rms": content.pop("source_rms"), "b_rms": content.pop("candidate_rms"), **content}


def diff(
    a: Checkpoint,
    b: Checkpoint,
    *,
    ids: ArrayLike | None = None,
    expected: Expected = ({}, {}),
    logits: bool = True,
    threads: int = 1,
    progress: Progress | None = None,
) -> Difference:
    """Compare ``a`` and ``b``. Differences are reported, never raised.

    ``ids``: running text as token ids (B, T) (default: as for ``verify``). ``logits``: run both models if anything
    differs; equal values with equal configs need no forward pass.
    """
    start = time.perf_counter()
    names = compare_names(a, b, sides=A_AND_B)
    config = _both_ways(_compare_configs, a, b)
    tokenizer = _both_ways(_compare_tokenizers, a, b)
    differences = _compare_tensors(a, b, expected, threads, progress)
    tensors = _tensors_part(differences)
    drift = None
    reason = None if logits else "not requested"
    if not any(part.failed for part in (names, config, tensors)) and not any(
        tensor.differing for tensor in differences
    ):
        reason = "equal values with equal configs: no forward pass can tell them apart"
    elif logits and not is_comparable(a, b):
        reason = "the two do not have the same tensors, so no forward pass can be compared"
    if reason is None:
        logits_part, drift = _compare_logits(a, b, ids, threads, progress)
    else:
        logits_part = GateResult("logits", "skipped", reason)
    parts = (names, config, tokenizer, tensors, logits_part)
    causes = _causes(a, b, parts, expected[0], threads) if any(part.failed for part in parts) else ()
    return Difference(Side.of(a), Side.of(b), parts, differences, drift, causes, time.perf_counter() - start)


def _both_ways(compare: _Compare[Compared], a: Compared, b: Compared) -> GateResult:
    """A gate that holds one side to the other, run both ways: a difference in either direction counts."""
    forward, backward = compare(a, b, sides=A_AND_B), compare(b, a, sides=A_AND_B[::-1])
    if forward.failed or not backward.failed:
        return forward
    errors = backward.errors
    subjects = {finding.subject for finding in errors}
    others = tuple(finding for finding in forward.findings if finding.subject not in subjects)
    return replace(forward, status="failed", summary=backward.summary, findings=errors + others)


def _compare_configs(a: Checkpoint, b: Checkpoint, /, *, sides: Sides) -> GateResult:
    stops = implied_stops(a), implied_stops(b)
    return compare_configs(a.config, b.config, sides=sides, implied_stops=stops)


def _compare_tokenizers(a: Checkpoint, b: Checkpoint, /, *, sides: Sides) -> GateResult:
    """A side without a tokenizer cannot be compared; that is not a difference of the models."""
    for side, checkpoint in zip(sides, (a, b), strict=True):
        if not _has_vocabulary(checkpoint):
            return GateResult("tokenizer", "skipped", f"{side} has no vocabulary: vocabularies not compared")
    return compare_tokenizers(a, b, sides=sides)


def _has_vocabulary(checkpoint: Checkpoint) -> bool:
    """Whether there is one; a damaged one is left to the comparison."""
    try:
        return checkpoint.tokenizer.has_vocabulary
    except InputRefused:
        return True


def _causes(
    a: Checkpoint, b: Checkpoint, parts: Sequence[GateResult], expected: Mapping[str, LazyTensor], threads: int
) -> tuple[Cause, ...]:
    """Known mistakes that would have made B from A."""
    from gemma2tool.verify.diagnosis.diagnose import diagnose

    return diagnose(a, b, parts, expected=expected, threads=threads)


def _compare_tensors(
    a: Checkpoint, b: Checkpoint, expected: Expected, threads: int, progress: Progress | None
) -> tuple[TensorDifference, ...]:
    """The tensors that both have in one shape."""
    names = [
        name for name in a.tensors if name in b.tensors and tuple(a.tensors[name].shape) == tuple(b.tensors[name].shape)
    ]
    with progress_or_null(progress, sum(b.tensors[name].nbytes for name in names), "tensors") as bar:
        return tuple(
            compare_values(a.tensors, b.tensors, names, expected=expected, threads=threads, advance=bar.advance)
        )


def _tensors_part(tensors: Sequence[TensorDifference]) -> GateResult:
    gate = "tensors"
    differing = [tensor for tensor in tensors if tensor.differing and not tensor.by_convention]
    by_convention = [tensor for tensor in tensors if tensor.by_convention]
    findings = (*_differing_findings(gate, differing), *_convention_findings(gate, by_convention))
    equal = len(tensors) - len(differing) - len(by_convention)
    metrics = {"equal": equal, "differing": len(differing), "by_convention": len(by_convention)}
    also = f", {len(by_convention)} differ only by a format's convention" if by_convention else ""
    if not differing:
        return GateResult(gate, "passed", f"{equal} tensors have equal values{also}", metrics, findings)
    worst = max(differing, key=lambda tensor: tensor.relative_rmse)
    kinds = sorted({layer_and_kind(tensor.name)[1] for tensor in differing})
    kind_names = ", ".join(kinds[:4]) + (", ..." if len(kinds) > 4 else "")
    summary = (
        f"{len(differing)} of {len(tensors)} tensors differ ({kind_names}), most in {worst.name}: RMSE"
        f" {worst.relative_rmse:.3g} of its RMS; {equal} are equal{also}"
    )
    return GateResult(gate, "failed", summary, metrics, findings)


def _differing_findings(gate: str, tensors: Sequence[TensorDifference]) -> Iterator[Finding]:
    for tensor in tensors:
        a, b = tensor.first_values
        message = (
            f"{tensor.differing} of {tensor.values} values differ, by up to {tensor.max_abs_difference:.4g} (RMSE"
            f" {tensor.relative_rmse:.3g} of the tensor's RMS); the first at {list(tensor.first_index)}: A {a:.9g},"
            f" B {b:.9g}"
        )
        yield Finding(gate, "error", tensor.name, message)


def _convention_findings(gate: str, tensors: Sequence[TensorDifference]) -> Iterator[Finding]:
    for tensor in tensors:
        message = f"differs by up to {tensor.max_abs_difference:.3g}, by the convention of one side's format"
        yield Finding(gate, "note", tensor.name, message)


def _compare_logits(
    a: Checkpoint, b: Checkpoint, ids: ArrayLike | None, threads: int, progress: Progress | None
) -> tuple[GateResult, Drift]:
    from gemma2tool.verify.compare.logits import LogitOptions, compare_logits
    from gemma2tool.verify.prompts import prompt_for

    prompts, text = prompt_for(a, b) if ids is None else (as_prompts(ids), True)
    nbytes = sum(tensor.nbytes for side in (a, b) for tensor in side.tensors.values())
    with progress_or_null(progress, nbytes * pass_count(prompts.shape, a.config), "forward passes") as bar:
        run = compare_logits(a, b, prompts, LogitOptions(text=text), threads=threads, advance=bar.advance)
    metrics = run.metrics
    if any(metrics.nonfinite):
        message = f"{metrics.nonfinite[0]} logits of A and {metrics.nonfinite[1]} of B are NaN or infinite"
        return GateResult("logits", "reported", message, {"nonfinite": list(metrics.nonfinite)}), run.drift
    report: dict[str, Any] = {
        "positions": metrics.positions,
        "max_abs_difference": significant(metrics.max_abs_difference),
        "mean_abs_difference": significant(metrics.mean_abs_difference),
        "kl_a_to_b": significant(metrics.mean_kl),
        "kl_b_to_a": significant(metrics.mean_reverse_kl),
        "top1_agreement": significant(metrics.top1),
    }
    summary = (
        f"differ by up to {metrics.max_abs_difference:.3g}, {metrics.mean_abs_difference:.3g} on average, over"
        f" {metrics.positions} positions; KL(A || B) {metrics.mean_kl:.3g}, KL(B || A) {metrics.mean_reverse_kl:.3g};"
        f" the likeliest token is the same at {metrics.top1:.1%}"
    )
    prediction = metrics.prediction() if text else {}
    if prediction:
        perplexity_a, perplexity_b = prediction["perplexity_source"], prediction["perplexity_candidate"]
        report |= {"perplexity_a": perplexity_a, "perplexity_b": perplexity_b}
        summary += f"; perplexity A {perplexity_a:.4g}, B {perplexity_b:.4g}"
    depth = run.drift.first_divergence()
    if depth is not None:
        summary += f"; hidden states first diverge {depth_name(depth)}"
    if run.probe is not None:
        report["probe"] = {"max_abs_difference": significant(run.probe.metrics.max_abs_difference)}
    return GateResult("logits", "reported", summary, report), run.drift
