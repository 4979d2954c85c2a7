"""Has the candidate every tensor of the source, none besides, each in its shape? Answered from headers alone."""

from __future__ import annotations

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import DTYPE_NAMES
from gemma2tool.model.tensors import tensor_specs
from gemma2tool.verify.finding import Finding, GateResult, Sides

GATE = "completeness"
SIDES: Sides = ("the source", "the candidate")


def compare_names(source: Checkpoint, candidate: Checkpoint, *, sides: Sides = SIDES) -> GateResult:
    """The completeness gate: the candidate against the source, and against the tensor table of its own config."""
    findings = []
    ours, theirs = sides

    def error(name: str, message: str) -> None:
        findings.append(Finding(GATE, "error", name, message))

    for name, tensor in source.tensors.items():
        if name not in candidate.tensors:
            error(name, f"in {ours}, but not in {theirs}")
        elif (shape := candidate.tensors[name].shape) != tensor.shape:
            error(name, f"has shape {_shape(tensor.shape)} in {ours}, {_shape(shape)} in {theirs}")
    for name in sorted(candidate.tensors.keys() - source.tensors.keys()):
        error(name, f"in {theirs}, but not in {ours}")
    for name, spec in tensor_specs(candidate.config).items():
        if name in candidate.tensors and (shape := candidate.tensors[name].shape) != spec.shape:
            error(name, f"has shape {_shape(shape)}, the config of {theirs} asks for {_shape(spec.shape)}")
        elif spec.required and name not in candidate.tensors and name not in source.tensors:
            error(name, f"missing from both, though the config of {theirs} asks for it")
    for name, spec in candidate.specs.items():
        stored = candidate.tensors[name].stored
        if not spec.quantizable and stored not in DTYPE_NAMES.values() and name in source.tensors:
            error(name, f"quantized to {stored} in {theirs}, which tensors of its kind never are")
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
