"""The gate "readers": do the libraries that define a format read an output as gemma2tool does?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.verify.finding import Finding, GateResult

if TYPE_CHECKING:
    from gemma2tool.engines.readers.check import Readers, Reading
    from gemma2tool.verify.result import Verification

GATE = "readers"


class ReadersGate:
    """Adds the gate to a verification of the checkpoint that the libraries have been reading meanwhile."""

    def __init__(self, readers: Readers | None) -> None:
        self._readers = readers

    def added_to(self, verification: Verification) -> Verification:
        """The verification with the gate; unchanged if no library reads the format."""
        if self._readers is None:
            return verification
        reading = self._readers.reading()
        gates = (*verification.gates, gate_result(reading))
        return replace(verification, gates=gates, seconds={**verification.seconds, GATE: reading.own_seconds})


@contextmanager
def reading(candidate: Checkpoint, *, wanted: bool, own_names: bool) -> Iterator[ReadersGate]:
    """Lets the libraries read ``candidate`` while the block runs.

    ``own_names``: gemma2tool wrote it, so that every tensor has the name that the library knows.
    """
    from gemma2tool.engines.readers.check import Readers, has_library

    if not wanted or not has_library(candidate.format):
        yield ReadersGate(None)
        return
    with Readers(candidate, own_names=own_names) as readers:
        yield ReadersGate(readers)


def gate_result(reading: Reading) -> GateResult:
    """The outcome: failed for a disagreement; what a library could not do is a warning, and if it is everything, the
    gate is skipped."""
    findings = [
        Finding(GATE, "error", disagreement.subject, disagreement.message) for disagreement in reading.disagreements
    ]
    findings += [Finding(GATE, "warning", None, message) for message in reading.unable]
    metrics = {
        "libraries": list(reading.libraries),
        "tensors": reading.entries,
        "compared_tensors": reading.tensors,
        "compared_rows": reading.rows,
        "compared_as_stored": reading.stored,
    }
    imports = f"{reading.import_seconds:.2f} s of it to import" if reading.libraries else "nothing imported"
    timing = f"{reading.own_seconds:.2f} s, and {reading.cpu_seconds:.2f} s in a process beside it, {imports}"
    if reading.disagreements:
        first = findings[0]
        more = f" (and {len(reading.disagreements) - 1} more)" if len(reading.disagreements) > 1 else ""
        return GateResult(GATE, "failed", first.sentence + more, metrics, tuple(findings), timing)
    if not reading.tensors and not reading.stored:
        reason = "; ".join(reading.unable) or "the libraries found nothing to compare"
        return GateResult(GATE, "skipped", reason, metrics, timing=timing)
    return GateResult(GATE, "passed", _summary(reading), metrics, tuple(findings), timing)


def _summary(reading: Reading) -> str:
    compared = [f"{reading.rows:,} rows of {reading.tensors:,} tensors"] if reading.tensors else []
    if reading.stored:
        compared.append(f"{reading.stored:,} tensors as stored")
    names = f"names, shapes and types of {reading.entries:,} tensors" if reading.entries else "no header"
    return f"read alike by {' and '.join(reading.libraries)}: {names}, {' and '.join(compared)}"
