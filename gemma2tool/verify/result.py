"""The result of a verification, and its form as one JSON object.

The JSON object is deterministic: for the same two checkpoints, gates and token ids it is the same byte for byte, for
every number of threads. Times are kept beside it, not in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.storage.paths import workspace_path
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.finding import Finding, GateResult
from gemma2tool.verify.json_values import json_value

if TYPE_CHECKING:
    from gemma2tool.verify.compare.measurements import Measurements

SCHEMA_VERSION = 1
ENGINE, SERVER = "engine", "server"
"""The format of a side that is what a program computes, or a running server."""
_TOLERANCES = {"lossless": "bit for bit", "convention": "but for the rounding of the format's own convention"}
"""What the kinds that are no types promise."""


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints compared.

    ``stored``: number of values per stored type. ``nbytes``: size of its files.
    """

    path: str
    format: str
    stored: Mapping[str, int] = field(default_factory=dict)
    nbytes: int = 0

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Side:
        stored: Counter[str] = Counter()
        for tensor in checkpoint.tensors.values():
            stored[tensor.stored] += tensor.size
        nbytes = checkpoint.file_bytes
        return cls(str(checkpoint.known_as), checkpoint.format, dict(stored), nbytes)

    @property
    def bits_per_weight(self) -> float | None:
        """Bits of its files for each of its values; None where either is unknown."""
        values = sum(self.stored.values())
        return 8 * self.nbytes / values if self.nbytes and values else None

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "format": self.format, "stored": json_value(self.stored), "bytes": self.nbytes}


@dataclass(frozen=True)
class Verification:
    """The results of all gates for a candidate compared with its source.

    - ``kind``: what the candidate is held to, a row of ``gates.GATES`` ("lossless", "bf16", "q4_0", ...).
    - ``causes``: what explains the failures, likeliest first.
    - ``seconds``: wall time per level; not part of ``to_json``.
    - ``measurements``: the data for reports; ``to_json`` includes only their drift.
    - ``chosen``: differences that an option explicitly requested.
    - ``beyond_chosen_limits``: the candidate is beyond a limit that the user set, but within the default limits.
    - ``prompt``: the file of the text or tokens for the forward passes; empty if unknown.
    - ``command``: the command line that repeats the verification; empty if unknown.
    """

    source: Side
    candidate: Side
    kind: str
    gates: tuple[GateResult, ...]
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)
    causes: tuple[Cause, ...] = ()
    measurements: Measurements | None = field(default=None, compare=False, repr=False)
    chosen: tuple[str, ...] = ()
    beyond_chosen_limits: bool = False
    prompt: str = field(default="", compare=False)
    command: str = field(default="", compare=False)

    @property
    def passed(self) -> bool:
        """Whether no gate failed. Skipped gates do not fail; ``skipped`` lists them."""
        return not any(gate.failed for gate in self.gates)

    @property
    def against_receipt(self) -> bool:
        """Whether the candidate was compared with a receipt instead of its source; ``kind`` is then the receipt's."""
        return self.source.format == "receipt"

    @property
    def signature(self) -> GateResult | None:
        """The gate of the signature, if one was asked for."""
        return next((gate for gate in self.gates if gate.name == "signature"), None)

    @property
    def verdict(self) -> str:
        """What the gates together prove or refute, to complete "verified: ..." or "failed: ..."."""
        signature = self.signature
        signer = None if signature is None else signature.metrics["signer"]
        if signature is not None and (signature.failed or len(self.gates) == 1):
            return f"not as {signer} signed it" if signature.failed else f"as {signer} signed it"
        if self.against_receipt:
            if self.passed:
                signed = "unsigned" if signer is None else f"signed by {signer}"
                return f"matches its receipt ({signed}: it says that it was verified as {self.kind})"
            return "does not match its receipt"
        if self.candidate.format == ENGINE:
            return "run as the file means it" if self.passed else "not run as the file means it"
        if self.candidate.format == SERVER:
            return "served as the files mean it" if self.passed else "not served as the files mean it"
        if self.beyond_chosen_limits:
            return f"beyond a limit that --gate sets; within {self.kind} tolerance"
        if not self.passed:
            return "not the same model"
        tolerance = _TOLERANCES.get(self.kind, f"within {self.kind} tolerance")
        chosen = f", but for what was chosen: {', '.join(dict.fromkeys(self.chosen))}" if self.chosen else ""
        return f"the same model, {tolerance}{chosen}"

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
        """Return the result of the gate ``name``. Raises ``KeyError`` if it was not requested."""
        for gate in self.gates:
            if gate.name == name:
                return gate
        raise KeyError(name)

    def metrics(self, gate: str) -> Mapping[str, Any]:
        """Return what a gate measured; empty if it was not requested."""
        return next((result.metrics for result in self.gates if result.name == gate), {})

    def to_json(self) -> dict[str, Any]:
        drift = None if self.measurements is None else self.measurements.drift
        chosen = {"chosen": list(self.chosen)} if self.chosen else {}
        return {
            "schema_version": SCHEMA_VERSION,
            "passed": self.passed,
            **chosen,
            "kind": self.kind,
            "source": self.source.to_json(),
            "candidate": self.candidate.to_json(),
            "gates": [gate.to_json() for gate in self.gates],
            "causes": [json_value(cause.to_json()) for cause in self.causes],
            "drift": json_value(drift.to_json()) if drift is not None else None,
        }


@dataclass(frozen=True)
class Failure:
    """Why there is no verification: the run was refused, lacked something that it needs, or was interrupted.

    ``command``: the command that was run. ``subject``: the file it concerns, or empty. The other fields are those of
    the error.
    """

    command: str
    subject: str
    id: str
    message: str
    hint: str
    exit_code: int
    passed: ClassVar[bool] = False

    @property
    def path(self) -> str:
        """The subject, relative to the workspace."""
        return workspace_path(self.subject) if self.subject else ""

    def to_json(self) -> dict[str, Any]:
        """Return the error as ``--json`` prints it."""
        return {"id": self.id, "message": self.message, "hint": self.hint, "exit_code": self.exit_code}


Result = Verification | Failure
