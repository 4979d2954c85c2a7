"""``diff``: two checkpoints beside each other, neither of which is the truth.

The same questions as ``verify`` asks, with other rules: nothing is allowed for a type's rounding, every value that differs counts, and
what is measured is measured both ways. Only where a format's own conventions change a value (GGUF keeps norms as w + 1) is the other
side's value, put through the same convention, as good as equal; that is said.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.verify.compare.completeness import comparable, compare_names
from gemma2tool.verify.compare.config import compare_configs
from gemma2tool.verify.compare.measurements import Drift, layer_and_kind
from gemma2tool.verify.compare.tensor_diff import TensorDifference, compare_values
from gemma2tool.verify.compare.tokenizer import compare_tokenizers
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.finding import Finding, GateResult, Sides
from gemma2tool.verify.json_values import json_value, significant
from gemma2tool.verify.result import Side
from gemma2tool.verify.run import side_of

SCHEMA_VERSION = 1
A_AND_B = ("A", "B")


@dataclass(frozen=True)
class Difference:
    """What two checkpoints have in common and what not.

    ``parts``: a part of status "passed" found no difference, one that "failed" did; "reported" ones measure what the differences do to
    the logits. ``tensors``: of those that both have in one shape. ``causes``: known mistakes that, were A the source, would have made B
    of it. ``seconds``: not part of ``to_json``.
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
        """No part differs, but for what formats' own conventions change."""
        return not any(part.failed for part in self.parts)

    @property
    def verdict(self) -> str:
        if not self.same:
            return "they differ in " + ", ".join(part.name for part in self.parts if part.failed)
        kept = [each for each in self.tensors if each.by_convention]
        if not kept:
            return "equal values, config and tokenizer, as far as both say"
        largest = max(each.max_abs_difference for each in kept)
        return f"but for {len(kept)} tensors in which one side's format, by its own convention, keeps other values, by up to {largest:.3g}"

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "same": self.same,
            "verdict": self.verdict,
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "parts": [part.to_json() for part in self.parts],
            "tensors": {each.name: json_value(each.to_json()) for each in self.tensors},
            "causes": [json_value(cause.to_json()) for cause in self.causes],
            "drift": None if self.drift is None else _drift(self.drift),
        }


def _drift(drift: Drift) -> dict[str, Any]:
    told = json_value(drift.to_json())
    return {"a_rms": told.pop("source_rms"), "b_rms": told.pop("candidate_rms"), **told}


def diff(
    a: Checkpoint,
    b: Checkpoint,
    *,
    ids: np.ndarray | None = None,
    kept: tuple[Mapping[str, LazyTensor], Mapping[str, LazyTensor]] = ({}, {}),
    logits: bool = True,
    threads: int = 1,
    progress: Progress | None = None,
) -> Difference:
    """Compare ``a`` and ``b``; never raises for a difference.

    ``ids``: running text as token ids (B, T) (default: as for ``verify``). ``kept``: A's tensors as B's format would give them back, and
    B's as A's would. ``logits``: run both models where anything differs; equal values in equal configs need no forward pass.
    """
    began = time.perf_counter()
    parts = [
        compare_names(a, b, sides=A_AND_B),
        _either_way(compare_configs, a.config, b.config),
        _either_way(_tokenizers, a, b),
    ]
    common = [
        name for name in a.tensors if name in b.tensors and tuple(a.tensors[name].shape) == tuple(b.tensors[name].shape)
    ]
    with progress_or_null(progress, sum(b.tensors[name].nbytes for name in common), "tensors") as bar:
        found = tuple(compare_values(a.tensors, b.tensors, common, kept=kept, threads=threads, advance=bar.advance))
    parts.append(_tensors(found))
    drift = None
    computes = parts[0], parts[1], parts[3]
    if not any(part.failed for part in computes) and not any(each.differing for each in found):
        parts.append(
            GateResult("logits", "skipped", "equal values in equal configs: no forward pass can tell them apart")
        )
    elif not logits:
        parts.append(GateResult("logits", "skipped", "not asked for"))
    elif not comparable(a, b):
        parts.append(
            GateResult("logits", "skipped", "the two do not hold the same tensors, so no forward pass can be compared")
        )
    else:
        told, drift = _logits(a, b, ids, threads, progress)
        parts.append(told)
    causes = _causes(a, b, parts, kept[0], threads) if any(part.failed for part in parts) else ()
    return Difference(side_of(a), side_of(b), tuple(parts), found, drift, causes, time.perf_counter() - began)


def _either_way(compare: Callable[..., GateResult], a: Any, b: Any) -> GateResult:
    """A gate that holds one side to the other, asked both ways: what counts as a difference one way, counts."""
    one, other = compare(a, b, sides=A_AND_B), compare(b, a, sides=A_AND_B[::-1])
    if one.failed or not other.failed:
        return one
    more = tuple(finding for finding in other.findings if finding.severity == "error")
    told = {finding.subject for finding in more}
    kept = tuple(finding for finding in one.findings if finding.subject not in told)
    return replace(one, status="failed", summary=other.summary, findings=more + kept)


def _tokenizers(a: Checkpoint, b: Checkpoint, *, sides: Sides) -> GateResult:
    """Where a side lacks a tokenizer, nothing can be compared: not a difference of the models."""
    if "tokenizer.model" in a.assets and "tokenizer.model" not in b.assets and "tokenizer.json" not in b.assets:
        return GateResult("tokenizer", "skipped", f"{sides[1]} carries no tokenizer.model: vocabularies not compared")
    return compare_tokenizers(a, b, sides=sides)


def _causes(
    a: Checkpoint, b: Checkpoint, parts: Sequence[GateResult], kept: Mapping[str, LazyTensor], threads: int
) -> tuple[Cause, ...]:
    """Known mistakes that would make B of A."""
    from gemma2tool.verify.diagnosis.diagnose import diagnose

    return diagnose(a, b, parts, expected=kept, threads=threads)


def _tensors(found: Sequence[TensorDifference]) -> GateResult:
    gate, differ = "tensors", [each for each in found if each.differing and not each.by_convention]
    kept = [each for each in found if each.by_convention]
    findings = [
        Finding(
            gate,
            "error",
            each.name,
            f"{each.differing} of {each.values} values differ, by up to {each.max_abs_difference:.4g} (RMS {each.relative:.3g} of the"
            f" tensor's); the first at {list(each.at)}: A {each.values_there[0]:.9g}, B {each.values_there[1]:.9g}",
        )
        for each in differ
    ]
    findings += [
        Finding(
            gate,
            "note",
            each.name,
            f"differs by up to {each.max_abs_difference:.3g}, which one side's format makes of it",
        )
        for each in kept
    ]
    equal = len(found) - len(differ) - len(kept)
    metrics = {"equal": equal, "differing": len(differ), "by_convention": len(kept)}
    beside = f", {len(kept)} but for what a format's convention changes" if kept else ""
    if not differ:
        return GateResult(gate, "passed", f"{equal} tensors hold equal values{beside}", metrics, tuple(findings))
    worst = max(differ, key=lambda each: each.relative)
    kinds = sorted({layer_and_kind(each.name)[1] for each in differ})
    named = ", ".join(kinds[:4]) + (", ..." if len(kinds) > 4 else "")
    summary = (
        f"{len(differ)} of {len(found)} tensors differ ({named}), most in {worst.name}: RMS {worst.relative:.3g} of the tensor's; {equal}"
        f" are equal{beside}"
    )
    return GateResult(gate, "failed", summary, metrics, tuple(findings))


def _logits(
    a: Checkpoint, b: Checkpoint, ids: np.ndarray | None, threads: int, progress: Progress | None
) -> tuple[GateResult, Drift]:
    from gemma2tool.verify.compare.logits import as_prompts, compare_logits, passes
    from gemma2tool.verify.prompts import prompt_for

    is_text = True
    if ids is None:
        ids, is_text = prompt_for(a, b)
    ids = as_prompts(ids)
    nbytes = sum(each.nbytes for side in (a, b) for each in side.tensors.values())
    with progress_or_null(progress, nbytes * passes(ids, a.config), "forward passes") as bar:
        run = compare_logits(a, b, ids, text=is_text, threads=threads, advance=bar.advance)
    metrics = run.metrics
    if any(metrics.nonfinite):
        said = f"{metrics.nonfinite[0]} logits of A and {metrics.nonfinite[1]} of B are NaN or infinite"
        return GateResult("logits", "reported", said, {"nonfinite": list(metrics.nonfinite)}), run.drift
    report = {
        "positions": metrics.positions,
        "max_abs_difference": significant(metrics.max_abs_difference),
        "mean_abs_difference": significant(metrics.mean_abs_difference),
        "kl_a_to_b": significant(metrics.mean_kl),
        "kl_b_to_a": significant(metrics.mean_kl_back),
        "top1_agreement": significant(metrics.top1),
    }
    summary = (
        f"differ by up to {metrics.max_abs_difference:.3g}, {metrics.mean_abs_difference:.3g} on average, over {metrics.positions} positions;"
        f" KL(A || B) {metrics.mean_kl:.3g}, KL(B || A) {metrics.mean_kl_back:.3g}; the likeliest token is the same at {metrics.top1:.1%}"
    )
    told = metrics.prediction() if is_text else {}
    if told:
        report |= {"perplexity_a": told["perplexity_source"], "perplexity_b": told["perplexity_candidate"]}
        summary += f"; perplexity A {told['perplexity_source']:.4g}, B {told['perplexity_candidate']:.4g}"
    parting = run.drift.parting()
    if parting is not None:
        summary += "; hidden states part " + ("at the embeddings" if parting == 0 else f"in layer {parting - 1}")
    if run.probe is not None:
        report["probe"] = {"max_abs_difference": significant(run.probe.metrics.max_abs_difference)}
    return GateResult("logits", "reported", summary, report), run.drift
