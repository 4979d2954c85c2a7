"""Carries out plans: stage, write, reopen with the built-in reader, verify, rename; or resumes what a
killed run left.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint, unchanged
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.pipeline import receipts
from gemma2tool.pipeline.calibration.boundaries import Boundaries
from gemma2tool.pipeline.leftovers import fingerprint_of
from gemma2tool.pipeline.plan import Plan
from gemma2tool.pipeline.requests import RunOptions
from gemma2tool.pipeline.tuning.output import NormTuning, check_tuning, tune_norms
from gemma2tool.pipeline.value_check import ValueCheck, clipped_tensor
from gemma2tool.pipeline.verification import ResolvedChecks, verify_output
from gemma2tool.pipeline.write import Target, write_outputs
from gemma2tool.storage.staging.staged_output import Staging

if TYPE_CHECKING:
    from gemma2tool.pipeline.budget.choice import BudgetOutcome
    from gemma2tool.verify.result import Verification

logger = logging.getLogger("gemma2tool")

_MAX_CLIPPED_NAMES = 5


@dataclass(frozen=True)
class ConversionResult:
    """What was written, and the result of its verification.

    - ``nbytes``: the size of the output. ``source_bytes``: bytes that this run read from the source.
    - ``seconds``: the time it took to write the output.
    - ``verification``: None if it was not requested; nothing is then claimed about the output.
    - ``receipt``: the path of the receipt, if one was written.
    - ``tensors``: the number of tensors in the output. ``resumed_tensors``: how many of them an earlier run completed.
    - ``clipped``: the number of values clipped to the largest float16, by tensor.
    - ``losses``: (canonical name, largest absolute loss) of the tensors that the target's convention rounds.
    - ``run_command``: a command line that runs the output in the program it is usually used with, if there is one.
    - ``budget``: the finished file compared with its budget's prediction, if there is a budget.
    - ``pinned``: the address of the exact revision that was read, if the source is not local.
    - ``norm_tuning``: the result of tuning the norms, if it was requested.
    """

    destination: Path
    format: str
    nbytes: int
    seconds: float
    source_bytes: int
    verification: Verification | None
    receipt: Path | None = None
    tensors: int = 0
    resumed_tensors: int = 0
    clipped: Mapping[str, int] = field(default_factory=dict)
    losses: tuple[tuple[str, float], ...] = ()
    run_command: str = ""
    budget: BudgetOutcome | None = None
    pinned: str | None = None
    norm_tuning: NormTuning | None = None

    @property
    def written(self) -> bool:
        """Whether the output is at the destination; an output that fails its verification is discarded."""
        return self.verification is None or self.verification.passed

    @property
    def passed(self) -> bool:
        """Whether the output was verified and passed; False if no verification was requested."""
        return self.verification is not None and self.verification.passed

    def to_json(self) -> dict[str, object]:
        """Return the result as ``--json`` prints it."""
        return {
            "destination": str(self.destination),
            "receipt": None if self.receipt is None else str(self.receipt),
            "format": self.format,
            "bytes": self.nbytes,
            "written": self.written,
            "verified": self.verification is not None and self.verification.passed,
            "write_seconds": round(self.seconds, 3),
            "resumed_tensors": self.resumed_tensors,
            "clipped": [{"tensor": name, "values": count} for name, count in self.clipped.items()],
            "losses": [{"tensor": name, "max_abs": loss} for name, loss in self.losses],
            "verification": None if self.verification is None else self.verification.to_json(),
            **({} if self.norm_tuning is None else {"norm_tuning": self.norm_tuning.to_json()}),
            **({} if self.budget is None else {"budget": self.budget.to_json()}),
        }


@dataclass(frozen=True)
class _StagedOutput:
    """One planned output on its way: ``resumed`` names the tensors that an earlier run completed."""

    plan: Plan
    staging: Staging
    target: Target
    resumed: frozenset[str]

    @property
    def bytes_to_read(self) -> int:
        items = self.plan.output.tensors
        return sum(item.source.nbytes for item in items if item.name not in self.resumed)


def run(
    plans: Sequence[Plan],
    checks: ResolvedChecks | None,
    options: RunOptions,
    progress: Progress | None = None,
    written: Callable[[], None] = lambda: None,
) -> tuple[ConversionResult, ...]:
    """Write the planned outputs of one source in one pass over it, verify each where it is staged, and only then rename
    it.

    An output whose verification fails is discarded, and its destination left as it was. If an input is refused, no
    output is written. If the process is killed or interrupted, or the machine fails, what is complete stays beside the
    destination: the next run of equal plans and options resumes it, unless ``options.restart``; a run of other plans
    refuses. ``checks``: None leaves out the verification, and with it the receipts. ``written``: called before the
    verification.
    """
    started = time.monotonic()
    with_receipts = options.receipt and checks is not None
    for plan in plans if with_receipts else ():
        receipts.check_place(plan.destination)
    for plan in plans:
        check_tuning(plan, options.threads)
    with ExitStack() as stack:
        outputs = [_stage(plan, options, stack) for plan in plans]
        sessions = [plan.session for plan in plans if plan.session is not None]
        for session in sessions:
            session.share_gradients(sessions)
        with unchanged(*(plan.source for plan in plans)):
            _write(outputs, options, progress)
            written()  # ranks that helped to calibrate are free from here on
            tunings = [_tuned(output, options, progress) for output in outputs]
        seconds = time.monotonic() - started
        results, commits = [], []
        for output, tuning in zip(outputs, tunings, strict=True):
            verification, receipt = _verify(output, checks, options, progress, tuning)
            staged_receipt = None
            if receipt is not None:
                staged_receipt = stack.enter_context(receipts.stage(output.plan.destination, receipt))
            result = replace(_result(output, seconds, verification, staged_receipt), norm_tuning=tuning)
            results.append(result)
            if result.written:
                commits.append((output.staging, staged_receipt))
        for plan in plans:
            plan.source.check_unchanged()
        receipts.commit(commits)
    return tuple(results)


def _stage(plan: Plan, options: RunOptions, stack: ExitStack) -> _StagedOutput:
    """Open the place beside the destination; sinks for what an earlier run has not finished."""
    output, session = plan.output, plan.session
    staging = stack.enter_context(
        Staging(
            plan.destination,
            force=options.force,
            expected_bytes=output.nbytes + (0 if session is None else session.kept_bytes),
            folder=not output.single_file,
            fingerprint=fingerprint_of(plan, options),
            restart=options.restart,
        )
    )
    sinks = {} if staging.finished else {file.name: staging.file(file.name, file.size) for file in output.files}
    target = Target(output, sinks, staging.completed, staging.complete)
    stage = 0
    if session is not None and not staging.finished:
        stage = session.continue_with(Boundaries(staging.kept, staging.is_recorded, session.stages(output)))
    if staging.finished:
        logger.info("%s: an earlier run ended when this output was already in place", plan.destination)
    elif staging.completed or stage:
        logger.info(
            "%s: resumed: %d of %d tensors were complete%s",
            plan.destination,
            len(staging.completed),
            len(output.tensors),
            f"; {stage} of {plan.source.config.num_hidden_layers} layers were calibrated" if stage else "",
        )
    return _StagedOutput(plan, staging, target, frozenset(target.records))


def _write(outputs: Sequence[_StagedOutput], options: RunOptions, progress: Progress | None) -> None:
    """Stream the source through all outputs that are not finished, then write their small files."""
    check = ValueCheck(
        allow_nonfinite=options.allow_nonfinite,
        clip=options.clip_f16,
        thorough=all(output.plan.session is None for output in outputs),
    )
    unfinished = [output for output in outputs if not output.staging.finished]
    label = outputs[0].plan.destination.name if len(outputs) == 1 else f"{len(outputs)} outputs"
    total = max(output.bytes_to_read for output in outputs)
    with progress_or_null(progress, total, label) as bar:
        targets = [output.target for output in unfinished]
        write_outputs(targets, threads=options.threads, memory=options.memory, check=check, advance=bar.advance)
    for output in unfinished:
        for name, data in output.plan.output.assets.items():
            output.staging.write_bytes(name, data)


def _tuned(output: _StagedOutput, options: RunOptions, progress: Progress | None) -> NormTuning | None:
    """Tune the norms of what is staged, if that was asked for."""
    plan = output.plan
    if not plan.options.calibration.tune_norms or output.staging.finished:
        return None
    opening = partial(registry.by_name(plan.output.format).open, output.staging.path)
    return tune_norms(plan, opening, output.target.sinks, threads=options.threads, progress=progress)


def _verify(
    output: _StagedOutput,
    checks: ResolvedChecks | None,
    options: RunOptions,
    progress: Progress | None,
    tuning: NormTuning | None,
) -> tuple[Verification | None, bytes | None]:
    """The verification of what is staged and, where it passed and one is asked for, its receipt."""
    plan, clipped = output.plan, output.target.clipped()
    if clipped:
        logger.warning("%s", _clipped_sentence(plan.destination, clipped))
    if checks is None:
        return None, None
    with registry.by_name(plan.output.format).open(output.staging.path) as candidate:
        candidate.path = plan.destination  # the name that the user knows
        verification = verify_output(
            _clipped_source(plan, clipped),
            candidate,
            replace(checks, readers=checks.readers and options.readers),
            threads=options.threads,
            progress=progress,
            options=plan.options,
        )
        if not (options.receipt and verification.passed):
            return verification, None
        more: dict[str, Any] = {} if tuning is None else {"norm_tuning": tuning.to_json()}
        receipt = receipts.make(
            plan, output.staging.path, candidate, verification, clipped, threads=options.threads, more=more
        )
        return verification, receipt


def _result(
    output: _StagedOutput, seconds: float, verification: Verification | None, receipt: Staging | None
) -> ConversionResult:
    plan = output.plan
    return ConversionResult(
        destination=plan.destination,
        format=plan.output.format,
        nbytes=plan.output.nbytes,
        seconds=seconds,
        source_bytes=output.bytes_to_read,
        verification=verification,
        receipt=None if receipt is None else receipt.destination,
        tensors=len(plan.output.tensors),
        resumed_tensors=len(output.resumed),
        clipped=output.target.clipped(),
        losses=tuple(plan.output.losses),
        run_command=registry.FACTS[plan.output.format].command_for(plan.destination),
        pinned=plan.source.pinned,
    )


def _clipped_sentence(destination: Path, counts: Mapping[str, int]) -> str:
    named = [f"{name} ({count})" for name, count in counts.items()]
    hidden = len(named) - _MAX_CLIPPED_NAMES
    more = f" and {hidden} more" if hidden > 0 else ""
    return (
        f"{destination}: {sum(counts.values())} values beyond float16 were clipped to its largest, 65504,"
        f" in {len(named)} tensors: {', '.join(named[:_MAX_CLIPPED_NAMES])}{more}"
    )


def _clipped_source(plan: Plan, counts: Mapping[str, int]) -> Checkpoint:
    """The source as the output can hold it: an explicitly requested clip is not reported as an error."""
    names = {name for item in plan.output.tensors if item.name in counts for name in item.canonical}
    tensors = {
        name: clipped_tensor(tensor) if name in names else tensor for name, tensor in plan.source.tensors.items()
    }
    return replace(plan.source, tensors=tensors)
