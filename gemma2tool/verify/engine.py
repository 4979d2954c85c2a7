"""Another program's logits against our own forward pass over the same checkpoint: does an engine run the model right?

The file may be flawless and the engine that serves it still drop a soft cap. Where its logits are off, our forward pass is run again with
one known mistake at a time, until one of them says what the engine said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from gemma2tool.errors import UsageError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.verify import gate_results
from gemma2tool.verify.compare.metrics import LogitComparison
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.finding import Finding, GateResult
from gemma2tool.verify.gates import GATES
from gemma2tool.verify.result import Side, Verification
from gemma2tool.verify.run import side_of

KIND = "bf16"
"""Engines compute in half precision: the limits of weights that were rounded to it hold for their logits."""

_SLICE = 1 << 14


def judge_logits(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    logits: np.ndarray,
    *,
    name: str,
    gates: Mapping[str, float] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Hold ``logits`` to what ``checkpoint`` computes from ``ids``.

    ``ids``: int (T,) or (1, T). ``logits``: float (V,), (T', V) or (1, T', V), of the last T' positions. ``name``: what the logits are
    called in the result. Fails where a limit of ``gates.GATES["bf16"]`` (or of ``gates``) is passed, and where a known mistake
    explains a difference, however small. Raises ``UsageError`` for shapes that don't belong together.
    """
    from gemma2tool.reference.streaming import StreamedForward, use_threads
    from gemma2tool.verify.diagnosis.counterfactual import counterfactual

    ids = np.atleast_2d(np.asarray(ids)).astype(np.int64)
    given = np.asarray(logits)
    given = np.atleast_2d(given[0] if given.ndim == 3 and given.shape[0] == 1 else given)
    count, vocabulary = ids.shape[1], checkpoint.config.vocab_size
    if len(ids) != 1 or given.ndim != 2 or given.shape[1] != vocabulary or not 1 <= len(given) <= count:
        raise UsageError(
            "logits.shape",
            f"{name}: logits of shape {np.shape(logits)} for token ids of shape {ids.shape}",
            hint=f"give one prompt, and the logits of its last T positions: (T, {vocabulary})",
        )
    limits = GATES[KIND].overridden(gates)
    first = count - len(given)
    following = np.concatenate([ids[0, first + 1 :], [-1]])
    comparison = LogitComparison(len(given), following, atol=limits.logits or 0.0, rtol=limits.logits_rtol or 0.0)
    nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    with use_threads(threads), progress_or_null(progress, nbytes, "forward pass") as bar:
        run = StreamedForward(
            checkpoint, ids, on_input=lambda tensor, _: bar.advance(checkpoint.tensors[tensor].nbytes, tensor)
        )
        ours = run.logits(first)[0]
    for start in range(0, vocabulary, _SLICE):
        part = slice(start, start + _SLICE)
        comparison.add(start, ours[:, part], given[:, part].astype(np.float32))
    metrics = comparison.finish()
    results = gate_results.engine(metrics, KIND, limits)
    cause = None
    if any(metrics.nonfinite):
        results[0] = _nonfinite(results[0], name, given.size, metrics.nonfinite)
    elif metrics.max_abs_difference:
        with progress_or_null(progress, 0, "known mistakes"):
            cause = counterfactual(checkpoint, ids, given, threads=threads)
    if any(metrics.nonfinite):
        results.append(GateResult("mistakes", "skipped", "logits are not finite"))
    else:
        results.append(_mistakes(cause))
    theirs = Side(name, "logits", {str(given.dtype): given.size})
    return Verification(side_of(checkpoint), theirs, KIND, tuple(results), causes=(cause,) if cause else ())


def _nonfinite(result: GateResult, name: str, count: int, nonfinite: tuple[int, int]) -> GateResult:
    """The logits gate's result, saying whose logits are not numbers."""
    ours, theirs = nonfinite
    said = f"{theirs} of {count} logits of {name} are NaN or infinite" if theirs else f"all logits of {name} are finite"
    if ours:
        said += f"; {ours} of our own forward pass over the checkpoint are NaN or infinite"
    return dataclasses.replace(result, summary=said, findings=(Finding(result.name, "error", None, said),))


def _mistakes(cause: Cause | None) -> GateResult:
    gate = "mistakes"
    if cause is None:
        return GateResult(gate, "passed", "no known mistake of an engine explains what differs")
    said = f"a known mistake explains the difference: {cause.message}"
    return GateResult(gate, "failed", said, {}, (Finding(gate, "error", None, said),))
