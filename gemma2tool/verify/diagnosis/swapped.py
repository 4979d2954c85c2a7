"""The candidate and the source in each other's place: the source is the rounded or quantized one."""

from __future__ import annotations

from collections.abc import Sequence

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.compare.rules import TensorRules
from gemma2tool.verify.compare.tensors import compare_tensors
from gemma2tool.verify.diagnosis.cause import Cause

_TRIED = 3
_CONVENTION = 1e-6
"""RMSE / RMS of a norm that was stored as w + 1 and read back."""


def swapped_arguments(
    source: Checkpoint, candidate: Checkpoint, comparisons: Sequence[TensorComparison], threads: int = 1
) -> Cause | None:
    """The cause if tensors of the source are those of the candidate, rounded or quantized.

    Compares the smallest tensors that differ the other way round.
    """
    failed = [comparison for comparison in comparisons if not comparison.ok and comparison.relative_rmse > _CONVENTION]
    wrong = [comparison.name for comparison in failed]
    if not wrong or any(source.tensors[name].stored == candidate.tensors[name].stored for name in wrong):
        return None
    tried = sorted(wrong, key=lambda name: (candidate.tensors[name].size, name))[:_TRIED]
    reversed_roles = compare_tensors(
        {name: candidate.tensors[name] for name in tried}, source.tensors, TensorRules(), threads=threads
    )
    if not all(comparison.ok and comparison.rule in ("cast", "bound") for comparison in reversed_roles):
        return None
    types = ", ".join(sorted({source.tensors[name].stored for name in wrong}))
    message = (
        f"the reference is the coarser of the two ({types}) and within its types' bounds of the candidate: they may be"
        f" exchanged, so name the original with --reference: gemma2tool verify {source.path.name} --reference"
        f" {candidate.path.name}"
    )
    return Cause("arguments.swapped", message, tuple(wrong))
