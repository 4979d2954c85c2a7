"""What a verification says: findings, gates, and all of it as one JSON object.

The JSON object is deterministic: for the same two checkpoints, gates and token ids it is the same byte for byte,
whatever the number of threads. Times live beside it, never in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gemma2tool.verify.compare.measurements import Measurements
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.finding import Finding, GateResult
from gemma2tool.verify.json_values import json_value

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints compared: where it is, its format, how many values it stores as which type, and the bytes of its
    files."""

    path: str
    format: str
    stored: Mapping[str, int] = field(default_factory=dict)
    nbytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "format": self.format, "stored": json_value(self.stored), "bytes": self.nbytes}


@dataclass(frozen=True)
class Verification:
    """All gates' results for a candidate against its source.

    ``kind``: what was asked of the candidate, a row of ``gates.GATES`` ("lossless", "bf16", "q4_0", ...). ``causes``:
    what explains the failures, likeliest first. ``seconds``: wall time per level; not part of ``to_json``.
    ``measurements``: not a judgement but the data of reports; of it ``to_json`` has the drift.
    """

    source: Side
    candidate: Side
    kind: str
    gates: tuple[GateResult, ...]
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)
    causes: tuple[Cause, ...] = ()
    measurements: Measurements | None = field(default=None, compare=False, repr=False)

    @property
    def passed(self) -> bool:
        """No gate failed. Skipped gates do not fail; ``skipped`` names them."""
        return not any(gate.failed for gate in self.gates)

    @property
    def against_receipt(self) -> bool:
        """The source was not at hand, only what a receipt says of the output; ``kind`` is then what was asked when it was written."""
        return self.source.format == "receipt"

    @property
    def verdict(self) -> str:
        """What the gates together prove, or refute, in words that finish "verified: ..." or "failed: ..."."""
        if self.against_receipt:
            return (
                f"what its receipt says (verified then as {self.kind})" if self.passed else "not what its receipt says"
            )
        if not self.passed:
            return "not the same model"
        return (
            "the same model, bit for bit"
            if self.kind == "lossless"
            else f"the same model, as near as {self.kind} comes"
        )

    @property
    def failures(self) -> tuple[Finding, ...]:
        """Every finding of severity "error", in the order of the gates."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def findings(self) -> Iterator[Finding]:
        return (finding for gate in self.gates for finding in gate.findings)

    @property
    def skipped(self) -> tuple[str, ...]:
        return tuple(gate.name for gate in self.gates if gate.status == "skipped")

    def gate(self, name: str) -> GateResult:
        """The result of the gate called ``name``; KeyError when it was not asked for."""
        for each in self.gates:
            if each.name == name:
                return each
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        drift = None if self.measurements is None else self.measurements.drift
        return {
            "schema_version": SCHEMA_VERSION,
            "passed": self.passed,
            "kind": self.kind,
            "source": self.source.to_json(),
            "candidate": self.candidate.to_json(),
            "gates": [gate.to_json() for gate in self.gates],
            "causes": [json_value(cause.to_json()) for cause in self.causes],
            "drift": json_value(drift.to_json()) if drift is not None else None,
        }
