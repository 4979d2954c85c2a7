"""Another program's logits against the built-in forward pass over the same checkpoint: does an engine run the model
right?

A file may be correct and the engine that serves it still omit a soft cap. If its logits are off, the forward pass is
run again with one known mistake at a time, until one of them gives the engine's logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from gemma2tool.errors import UsageError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import Array
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.verify import gate_results
from gemma2tool.verify.compare.metrics import LogitComparison, LogitMetrics
from gemma2tool.verify.compare.token_ids import TokenIds
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.finding import Finding, GateResult
from gemma2tool.verify.gates import GATES, Gates
from gemma2tool.verify.result import Side, Verification

KIND = "bf16"
"""Engines compute in half precision: the limits for weights rounded to it hold for their logits."""

_SLICE = 1 << 14


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitsSettings:
    """``gates``: limits that replace default ones. ``thorough``: look for a known mistake behind every difference, not
    only where a limit is exceeded."""

    gates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    threads: int | None = None
    progress: Progress | None = None
    thorough: bool = True


def verify_logits(
    checkpoint: Checkpoint, ids: ArrayLike, logits: ArrayLike, *, name: str, settings: LogitsSettings | None = None
) -> Verification:
    """Compare ``logits`` with those that ``checkpoint`` gives for ``ids``.

    ``ids``: int (T,) or (1, T). ``logits``: float (V,), (T', V) or (1, T', V), of the last T' positions. ``name``: the
    name of the logits in the result. The verification fails if a limit of ``gates.GATES["bf16"]`` (or of the settings)
    is exceeded, or if a known mistake explains a difference, however small. Raises ``UsageError`` for shapes that do
    not match.
    """
    from gemma2tool.verify.diagnosis.counterfactual import counterfactual

    prompt, given = _checked(checkpoint, ids, logits, name)
    settings = settings or LogitsSettings()
    threads, progress = settings.threads, settings.progress
    limits = GATES[KIND].overridden(settings.gates)
    metrics = _compare(checkpoint, prompt, given, limits, threads, progress)
    results = gate_results.engine_gates(metrics, KIND, limits)
    cause = None
    if any(metrics.nonfinite):
        results[0] = _nonfinite(results[0], name, given.size, metrics.nonfinite)
        results.append(GateResult("mistakes", "skipped", "logits are not finite"))
    elif not settings.thorough and not any(gate.failed for gate in results):
        results.append(GateResult("mistakes", "skipped", "not looked for behind differences within the limits"))
    else:
        if metrics.max_abs_difference:
            with progress_or_null(progress, 0, "known mistakes"):
                cause = counterfactual(checkpoint, prompt, given, threads=threads)
        results.append(_mistakes(cause))
    candidate = Side(name, "logits", {str(given.dtype): given.size})
    return Verification(Side.of(checkpoint), candidate, KIND, tuple(results), causes=(cause,) if cause else ())


def _checked(checkpoint: Checkpoint, ids: ArrayLike, logits: ArrayLike, name: str) -> tuple[TokenIds, Array]:
    """The prompt (1, T) and the logits (T', V). Raises ``UsageError`` for other shapes."""
    prompt = np.atleast_2d(np.asarray(ids)).astype(np.int64)
    given = np.asarray(logits)
    given = np.atleast_2d(given[0] if given.ndim == 3 and given.shape[0] == 1 else given)
    vocabulary = checkpoint.config.vocab_size
    if len(prompt) != 1 or given.ndim != 2 or given.shape[1] != vocabulary or not 1 <= len(given) <= prompt.shape[1]:
        raise UsageError(
            "logits.shape",
            f"{name}: logits of shape {np.shape(logits)} for token ids of shape {prompt.shape}",
            hint=f"pass one prompt, and the logits of its last T positions: (T, {vocabulary})",
        )
    return prompt, given


def _compare(
    checkpoint: Checkpoint,
    prompt: TokenIds,
    given: Array,
    limits: Gates,
    threads: int | None,
    progress: Progress | None,
) -> LogitMetrics:
    """The checkpoint's logits as the source, the given ones as the candidate."""
    from gemma2tool.reference.streaming import StreamedForward, use_threads

    first = prompt.shape[1] - len(given)
    following = np.concatenate([prompt[0, first + 1 :], [-1]])
    comparison = LogitComparison(len(given), following, atol=limits.logits or 0.0, rtol=limits.logits_rtol or 0.0)
    nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    with use_threads(threads), progress_or_null(progress, nbytes, "forward pass") as bar:

        def on_input(name: str, _: object) -> None:
            bar.advance(checkpoint.tensors[name].nbytes, name)

        computed = StreamedForward(checkpoint, prompt, on_input=on_input).logits(first)[0]
    for start in range(0, checkpoint.config.vocab_size, _SLICE):
        columns = slice(start, start + _SLICE)
        comparison.add(start, computed[:, columns], given[:, columns].astype(np.float32))
    return comparison.finish()


def _nonfinite(result: GateResult, name: str, count: int, nonfinite: tuple[int, int]) -> GateResult:
    """The logits gate's result, with a message that says whose logits are not finite."""
    in_computed, in_given = nonfinite
    message = (
        f"{in_given} of {count} logits of {name} are NaN or infinite"
        if in_given
        else f"all logits of {name} are finite"
    )
    if in_computed:
        message += f"; {in_computed} of the built-in forward pass over the checkpoint are NaN or infinite"
    return dataclasses.replace(result, summary=message, findings=(Finding(result.name, "error", None, message),))


def _mistakes(cause: Cause | None) -> GateResult:
    gate = "mistakes"
    if cause is None:
        return GateResult(gate, "passed", "no known mistake of an engine explains the difference")
    message = f"a known mistake explains the difference: {cause.message}"
    return GateResult(gate, "failed", message, {}, (Finding(gate, "error", None, message),))
