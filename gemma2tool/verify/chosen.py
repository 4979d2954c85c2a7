"""What a user chose: differences that an option asked for, and limits tighter than the usual ones. Both are reported as
chosen, not explained as mistakes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config_fields import CONFIG_FIELDS
from gemma2tool.verify.compare.bounds import BOUNDS
from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.finding import Finding, GateResult
from gemma2tool.verify.gates import GATES


@dataclass(frozen=True)
class Chosen:
    """``subjects``: what findings are about (config fields, parts of the tokenizer, tensors) that an option asked to be
    otherwise than in the source, each with that option as typed.
    """

    subjects: Mapping[str, str] = field(default_factory=dict)

    def reported(self, gate: GateResult) -> GateResult:
        """The gate's result with chosen differences as warnings; it passes if nothing else was wrong."""
        findings = tuple(map(self._reported, gate.findings))
        changed = [new for new, old in zip(findings, gate.findings, strict=True) if new is not old]
        if not changed:
            return gate
        errors = [finding for finding in findings if finding.severity == "error"]
        if errors:
            more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
            return replace(gate, summary=errors[0].sentence + more, findings=findings)
        names = ", ".join(dict.fromkeys(str(finding.subject) for finding in changed))
        return replace(
            gate, status="passed", summary=f"all as in the source but what was chosen: {names}", findings=findings
        )

    def _reported(self, finding: Finding) -> Finding:
        option = self.subjects.get(finding.subject or "")
        if option is None or finding.severity != "error":
            return finding
        return replace(finding, severity="warning", message=f"{finding.message} (chosen with {option})")

    def source_as_chosen(self, source: Checkpoint, candidate: Checkpoint) -> Checkpoint:
        """The source as the candidate was asked to be: chosen fields of its config have the candidate's values, chosen
        tensors that it lacks are absent.
        """
        if not self.subjects:
            return source
        fields = {name: getattr(candidate.config, name) for name in CONFIG_FIELDS if name in self.subjects}
        tensors = {
            name: tensor
            for name, tensor in source.tensors.items()
            if name not in self.subjects or name in candidate.tensors
        }
        return replace(source, config=replace(source.config, **fields), tensors=tensors)


def only_beyond_chosen_limits(
    gates: Sequence[GateResult],
    usual: Sequence[GateResult],
    comparisons: Sequence[TensorComparison],
    limits: Mapping[str, float],
) -> bool:
    """Whether the gates failed and would pass with the usual limits.

    ``usual``: the gates on logits by the usual limits. ``comparisons``: of all tensors. ``limits``: those that were
    chosen, by name.
    """
    failed = {gate.name for gate in gates if gate.failed}
    if not failed or not limits or failed - {"tensors", *(gate.name for gate in usual)}:
        return False
    if any(gate.failed and gate.name in failed for gate in usual):
        return False
    return "tensors" not in failed or all(
        comparison.ok or _is_within_usual_bound(comparison, limits) for comparison in comparisons
    )


def _is_within_usual_bound(comparison: TensorComparison, limits: Mapping[str, float]) -> bool:
    """Whether only the chosen limit on the RMSE fails a tensor."""
    bound = BOUNDS.get(comparison.candidate_type)
    if bound is None or "rmse" not in limits or comparison.bad_blocks or comparison.differing or comparison.nonfinite:
        return False
    return comparison.relative_rmse <= bound.relative_rmse


def said_as_chosen(gate: GateResult, kind: str) -> GateResult:
    """A failed gate's result, saying that its limit was chosen and that the usual one holds."""
    if not gate.failed:
        return gate
    usual = GATES[kind]
    limit = f" (mean KL {usual.kl:g})" if gate.name == "distribution" and usual.kl is not None else ""
    return replace(
        gate, summary=f"{gate.summary}; that limit was chosen with --gate, the usual one of {kind} holds{limit}"
    )
