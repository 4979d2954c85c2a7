"""Carries out a plan: stage, write, reopen with our own reader, verify, rename."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemma2tool.formats import registry
from gemma2tool.pipeline.plan import Plan
from gemma2tool.pipeline.write import write_outputs
from gemma2tool.storage.staging import Staging

if TYPE_CHECKING:
    from gemma2tool.console import Console
    from gemma2tool.verify.result import Verification


@dataclass(frozen=True)
class Checks:
    """How the output is verified: token ids (B, T) or None for the built-in ones, and the limits to override."""

    ids: np.ndarray | None = None
    gates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResult:
    """What a run did; ``verification`` is None where it was not asked for, and then nothing is claimed."""

    plan: Plan
    seconds: float
    verification: Verification | None

    @property
    def written(self) -> bool:
        return self.verification is None or self.verification.passed

    def sentence(self) -> str:
        """One line for a person."""
        output, destination = self.plan.output, self.plan.destination
        if not self.written:
            return f"{destination}: NOT written, the verification failed"
        rate = self.plan.source_bytes / max(self.seconds, 1e-9) / 1e6
        verdict = "not verified (--no-verify)"
        if self.verification is not None:
            verdict = f"verified in {sum(self.verification.seconds.values()):.1f} s"
        return f"{destination}: {output.nbytes:,} bytes written in {self.seconds:.1f} s ({rate:,.0f} MB/s of source), {verdict}"

    def to_json(self) -> dict[str, object]:
        return {
            "destination": str(self.plan.destination),
            "format": self.plan.output.format,
            "bytes": self.plan.output.nbytes,
            "written": self.written,
            "verified": self.verification is not None and self.verification.passed,
            "write_seconds": round(self.seconds, 3),
            "losses": [{"tensor": name, "max_abs": loss} for name, loss in self.plan.output.losses],
            "verification": None if self.verification is None else self.verification.to_json(),
        }


def run(
    plans: Sequence[Plan],
    checks: Checks | None,
    *,
    force: bool,
    threads: int,
    memory: int,
    allow_nonfinite: bool,
    console: Console,
) -> list[RunResult]:
    """Write the planned outputs of one source, in one pass over it, beside their destinations; verify each there; only then rename it.

    An output whose verification fails is discarded, and its destination left as it was; where anything else goes wrong, all are.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        stagings, outputs = [], []
        for plan in plans:
            output = plan.output
            staging = stack.enter_context(
                Staging(plan.destination, force=force, expected_bytes=output.nbytes, folder=not output.single_file)
            )
            stagings.append(staging)
            outputs.append((output, {file.name: staging.file(file.name, file.size) for file in output.files}))
        label = plans[0].destination.name if len(plans) == 1 else f"{len(plans)} outputs"
        with console.progress(max(plan.source_bytes for plan in plans), label) as progress:
            write_outputs(
                outputs, threads=threads, memory=memory, allow_nonfinite=allow_nonfinite, advance=progress.advance
            )
        for plan, staging in zip(plans, stagings, strict=True):
            for name, data in plan.output.assets.items():
                staging.write_bytes(name, data)
        seconds = time.monotonic() - started
        results = []
        for plan, staging in zip(plans, stagings, strict=True):
            verification = None if checks is None else _verify(plan, staging.path, checks, threads, console)
            results.append(RunResult(plan, seconds, verification))
        for result, staging in zip(results, stagings, strict=True):
            if result.written:
                staging.commit()
    return results


def _verify(plan: Plan, staged: Path, checks: Checks, threads: int, console: Console) -> Verification:
    from gemma2tool.pipeline.evaluate import judge

    with registry.by_name(plan.output.format).open(staged) as candidate:
        candidate.path = plan.destination  # what the user knows it by
        return judge(
            plan.source,
            candidate,
            ids=checks.ids,
            gates=checks.gates,
            threads=threads,
            console=console,
            weighted=plan.options.extra.get("imatrix") is not None,
        )
