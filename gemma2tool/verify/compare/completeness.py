"""The completeness gate: whether the candidate has every tensor of the source in its shape, and no others.

Reads headers only.
"""

from __future__ import annotations

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import DTYPE_NAMES
from gemma2tool.model.tensors import tensor_specs
from gemma2tool.verify.finding import Finding, GateResult, Sides

GATE = "completeness"
SIDES: Sides = ("the source", "the candidate")


def compare_names(source: Checkpoint, candidate: Checkpoint, *, sides: Sides = SIDES) -> GateResult:
    """The completeness gate: the candidate against the source, and against the tensor table of its own config."""
    findings: list[Finding] = []
    source_name, candidate_name = sides

    def error(name: str, message: str) -> None:
        findings.append(Finding(GATE, "error", name, message))

    for name, tensor in source.tensors.items():
        if name not in candidate.tensors:
            error(name, f"in {source_name}, but not in {candidate_name}")
        elif (shape := candidate.tensors[name].shape) != tensor.shape:
            error(name, f"has shape {_text(tensor.shape)} in {source_name}, {_text(shape)} in {candidate_name}")
    for name in sorted(candidate.tensors.keys() - source.tensors.keys()):
        error(name, f"in {candidate_name}, but not in {source_name}")
    for name, spec in tensor_specs(candidate.config).items():
        if name in candidate.tensors and (shape := candidate.tensors[name].shape) != spec.shape:
            error(name, f"has shape {_text(shape)}, but the config of {candidate_name} requires {_text(spec.shape)}")
        elif spec.required and name not in candidate.tensors and name not in source.tensors:
            error(name, f"missing from both, although the config of {candidate_name} requires it")
    for name, spec in candidate.specs.items():
        stored = candidate.tensors[name].stored
        if len(spec.shape) < 2 and stored not in DTYPE_NAMES.values() and name in source.tensors:
            error(name, f"quantized to {stored} in {candidate_name}; tensors of its kind are never quantized")
    for name, sentence in candidate.misread.items():
        error(name, sentence)
    metrics = {"source_tensors": len(source.tensors), "candidate_tensors": len(candidate.tensors)}
    unread = [
        Finding(GATE, "warning", ", ".join(files.names), f"not compared, but {files.sentence}")
        for files in candidate.loader_files
    ]
    if not findings:
        summary = f"all {len(source.tensors)} tensors, with the right shapes, and no others"
        summary += f"; {len(unread)} warning{'s' * (len(unread) != 1)}" if unread else ""
        return GateResult(GATE, "passed", summary, metrics, tuple(unread))
    first = findings[0]
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    return GateResult(GATE, "failed", f"{first.subject}: {first.message}{more}", metrics, (*findings, *unread))


def is_comparable(source: Checkpoint, candidate: Checkpoint) -> bool:
    """Whether both have the same tensors in the same shapes, so that their forward passes can be compared."""
    source_shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    return source_shapes == {name: tensor.shape for name, tensor in candidate.tensors.items()}


def _text(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
