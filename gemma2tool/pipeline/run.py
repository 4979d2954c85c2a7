"""Carries out a plan: stage, write, reopen with our own reader, verify, rename; or goes on where a run that was killed had come to."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline import receipts
from gemma2tool.pipeline.fingerprint import can_continue, fingerprint
from gemma2tool.pipeline.plan import Plan
from gemma2tool.pipeline.terminal import Terminal
from gemma2tool.pipeline.value_check import ValueCheck, clipped_tensor
from gemma2tool.pipeline.write import Target, write_outputs
from gemma2tool.storage.staging.staged_output import Staging

if TYPE_CHECKING:
    from gemma2tool.verify.result import Verification


@dataclass(frozen=True)
class Checks:
    """How the output is verified: token ids (B, T) or None for the built-in ones, and the limits to override."""

    ids: np.ndarray | None = None
    gates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResult:
    """What a run did; ``verification`` is None where it was not asked for, and then nothing is claimed.

    ``receipt``: where it was written, if it was. ``resumed``: tensors that an earlier run had completed. ``clipped``: values clipped
    to the largest float16, by tensor.
    """

    plan: Plan
    seconds: float
    verification: Verification | None
    receipt: Path | None = None
    resumed: Mapping[str, object] = field(default_factory=dict)
    clipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def written(self) -> bool:
        return self.verification is None or self.verification.passed

    def sentence(self) -> str:
        """One line for a person."""
        output, destination = self.plan.output, self.plan.destination
        if not self.written:
            return f"{destination}: NOT written, the verification failed"
        rate = _bytes_to_read(self.plan, self.resumed) / max(self.seconds, 1e-9) / 1e6
        verdict = "not verified (--no-verify)"
        if self.verification is not None:
            verdict = f"verified in {sum(self.verification.seconds.values()):.1f} s"
        if self.receipt is not None:
            verdict += f", receipt {self.receipt.name}"
        resumed = f", {len(self.resumed)} of {len(output.tensors)} tensors by an earlier run" if self.resumed else ""
        return f"{destination}: {output.nbytes:,} bytes written in {self.seconds:.1f} s ({rate:,.0f} MB/s of source){resumed}, {verdict}"

    def to_json(self) -> dict[str, object]:
        return {
            "destination": str(self.plan.destination),
            "receipt": None if self.receipt is None else str(self.receipt),
            "format": self.plan.output.format,
            "bytes": self.plan.output.nbytes,
            "written": self.written,
            "verified": self.verification is not None and self.verification.passed,
            "write_seconds": round(self.seconds, 3),
            "resumed_tensors": len(self.resumed),
            "clipped": [{"tensor": name, "values": count} for name, count in self.clipped.items()],
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
    console: Terminal,
    clip_float16: bool = False,
    restart: bool = False,
    receipt: bool = True,
) -> list[RunResult]:
    """Write the planned outputs of one source, in one pass over it, beside their destinations; verify each there; only then rename it.

    An output whose verification fails is discarded, and its destination left as it was; where an input is refused, all are. Where the
    process is killed, interrupted, or the machine fails it, what was complete stays beside the destination, and the next run of equal
    plans and options goes on with it, unless ``restart``; one of other plans refuses. ``receipt``: write one beside each output that
    was verified.
    """
    started = time.monotonic()
    for plan in plans if receipt and checks is not None else ():
        receipts.check_place(plan.destination)
    asked = {"allow_nonfinite": allow_nonfinite, "clip_f16": clip_float16}
    check = ValueCheck(allow_nonfinite=allow_nonfinite, clip=clip_float16, thorough=all(map(can_continue, plans)))
    with ExitStack() as stack:
        stagings, targets = [], []
        for plan in plans:
            output = plan.output
            staging = stack.enter_context(
                Staging(
                    plan.destination,
                    force=force,
                    expected_bytes=output.nbytes,
                    folder=not output.single_file,
                    fingerprint=fingerprint(plan, asked),
                    restart=restart,
                )
            )
            sinks = {} if staging.finished else {file.name: staging.file(file.name, file.size) for file in output.files}
            stagings.append(staging)
            told = {"complete": staging.complete} if can_continue(plan) else {}
            targets.append(Target(output, sinks, staging.completed, **told))
            _tell_resumed(plan, staging, console)
        resumed = [dict(target.records) for target in targets]
        label = plans[0].destination.name if len(plans) == 1 else f"{len(plans)} outputs"
        left = max(_bytes_to_read(plan, done) for plan, done in zip(plans, resumed, strict=True))
        with console.progress(left, label) as progress:
            unfinished = [target for target, staging in zip(targets, stagings, strict=True) if not staging.finished]
            write_outputs(unfinished, threads=threads, memory=memory, check=check, advance=progress.advance)
        for plan, staging in zip(plans, stagings, strict=True):
            if not staging.finished:
                for name, data in plan.output.assets.items():
                    staging.write_bytes(name, data)
        seconds = time.monotonic() - started
        results, made = [], []
        for plan, staging, target, done in zip(plans, stagings, targets, resumed, strict=True):
            counts = target.clipped()
            _tell_clipped(plan, counts, console)
            verification, data = None, None
            if checks is not None:
                verification, data = _verify(plan, staging.path, counts, checks, threads, console, receipt)
            beside = None if data is None else stack.enter_context(receipts.stage(plan.destination, data))
            where = None if beside is None else beside.destination
            results.append(RunResult(plan, seconds, verification, where, done, counts))
            made.append((staging, beside))
        receipts.commit([pair for result, pair in zip(results, made, strict=True) if result.written])
    return results


def _bytes_to_read(plan: Plan, done: Mapping[str, object]) -> int:
    return sum(item.source.nbytes for item in plan.output.tensors if item.name not in done)


def _tell_resumed(plan: Plan, staging: Staging, console: Terminal) -> None:
    if staging.finished:
        console.note(f"{plan.destination}: an earlier run was ended when this was in place already")
    elif staging.completed:
        console.note(
            f"{plan.destination}: resumed: {len(staging.completed)} of {len(plan.output.tensors)} tensors were complete"
        )


def _tell_clipped(plan: Plan, counts: Mapping[str, int], console: Terminal) -> None:
    if counts:
        named = [f"{name} ({count})" for name, count in counts.items()]
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        console.warn(
            f"{plan.destination}: {sum(counts.values())} values beyond float16 were clipped to its largest, 65504, in {len(named)}"
            f" tensors: {', '.join(named[:5])}{more}"
        )


def _clipped_source(plan: Plan, counts: Mapping[str, int]) -> Checkpoint:
    """The source as the output can hold it: what was asked to be clipped is no fault of the output."""
    names = {name for item in plan.output.tensors if item.name in counts for name in item.canonical}
    tensors = {
        name: clipped_tensor(tensor) if name in names else tensor for name, tensor in plan.source.tensors.items()
    }
    return replace(plan.source, tensors=tensors)


def _verify(
    plan: Plan, staged: Path, clipped: Mapping[str, int], checks: Checks, threads: int, console: Terminal, receipt: bool
) -> tuple[Verification, bytes | None]:
    """The verification of what is staged and, where it passed and one is wanted, its receipt."""
    from gemma2tool.pipeline.evaluate import judge

    with registry.by_name(plan.output.format).open(staged) as candidate:
        candidate.path = plan.destination  # what the user knows it by
        found = judge(
            _clipped_source(plan, clipped),
            candidate,
            ids=checks.ids,
            gates=checks.gates,
            threads=threads,
            console=console,
            weighted=plan.options.extra.get("imatrix") is not None,
        )
        wanted = receipt and found.passed
        return found, receipts.make(plan, staged, candidate, found, clipped, threads=threads) if wanted else None
