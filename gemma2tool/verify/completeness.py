"""Has the candidate every tensor of the source, none besides, each in its shape? Answered from headers alone."""

from __future__ import annotations

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.tensors import expand
from gemma2tool.verify.result import Finding, GateResult

GATE = "completeness"


def compare_names(source: Checkpoint, candidate: Checkpoint) -> GateResult:
    """The completeness gate: the candidate against the source, and against the tensor table of its own config."""
    findings = []

    def error(name: str, message: str) -> None:
        findings.append(Finding(GATE, "error", name, message))

    for name, tensor in source.tensors.items():
        if name not in candidate.tensors:
            error(name, "missing from the candidate")
        elif (shape := candidate.tensors[name].shape) != tensor.shape:
            error(name, f"has shape {_shape(tensor.shape)} in the source, {_shape(shape)} in the candidate")
    for name in sorted(candidate.tensors.keys() - source.tensors.keys()):
        error(name, "in the candidate, but not in the source")
    for name, spec in expand(candidate.config).items():
        if name in candidate.tensors and (shape := candidate.tensors[name].shape) != spec.shape:
            error(name, f"has shape {_shape(shape)}, the candidate's config asks for {_shape(spec.shape)}")
        elif spec.required and name not in candidate.tensors and name not in source.tensors:
            error(name, "missing from both sides, though the candidate's config asks for it")
    metrics = {"source_tensors": len(source.tensors), "candidate_tensors": len(candidate.tensors)}
    if not findings:
        return GateResult(
            GATE, "passed", f"all {len(source.tensors)} tensors, each in its shape, and none besides", metrics
        )
    first = findings[0]
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    return GateResult(GATE, "failed", f"{first.subject}: {first.message}{more}", metrics, tuple(findings))


def comparable(source: Checkpoint, candidate: Checkpoint) -> bool:
    """Whether both hold the same names in the same shapes, so that a forward pass can be compared."""
    ours = {name: tensor.shape for name, tensor in source.tensors.items()}
    return ours == {name: tensor.shape for name, tensor in candidate.tensors.items()}


def _shape(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
