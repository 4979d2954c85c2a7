"""Writes a file of each type, measures it on each text, and removes it again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemma2tool.errors import UsageError
from gemma2tool.formats import registry
from gemma2tool.formats.options import GGUFOptions, WriteOptions
from gemma2tool.formats.options_budget import PLACEHOLDER, Budget
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.devices import use_device
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.pipeline.calibration.text import read_sequences
from gemma2tool.pipeline.held_out import warn_of_chosen_text, warn_of_text_in_receipt
from gemma2tool.pipeline.output_names import check_type
from gemma2tool.pipeline.plan import make_plan
from gemma2tool.pipeline.quality.needs import imatrix_options, quality_needs
from gemma2tool.pipeline.quality.request import QualityRequest
from gemma2tool.pipeline.quality.result import Estimate, QualityPoint, QualityResult
from gemma2tool.pipeline.sensitivity.measured import check_comparable, window_divergence
from gemma2tool.pipeline.sensitivity.windows import describe
from gemma2tool.verify.compare.interval import bootstrap_interval

if TYPE_CHECKING:
    from gemma2tool.pipeline.needs.needs import Needs


@dataclass(frozen=True)
class _Job:
    """A file to measure: its name and variant, and how it is written; ``path``: one that exists."""

    name: str
    variant: str
    options: WriteOptions | None = None
    path: Path | None = None


def measure_quality(source: Checkpoint, request: QualityRequest, progress: Progress | None = None) -> QualityResult:
    """Measure every file of the request.

    Raises ``UsageError`` for nothing to measure, types that GGUF does not have, texts that are too short, and a size
    that no choice of types meets; ``InputRefused`` for a file or a table of another model.
    """
    ids = _checked(source, request)
    _warn_of_chosen_text(request)
    texts = {label: describe(path, ids[label]) for label, path in request.texts}
    needs = quality_needs(source, request, ids)
    needs.check(request.device)
    needs.announce()
    measured = _Measurement(source, ids, request.threads)
    points: list[QualityPoint] = []
    with ExitStack() as stack:
        stack.enter_context(use_device(request.device))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gemma2tool-quality-")))
        jobs = list(_jobs(source, request, folder))
        bar = stack.enter_context(progress_or_null(progress, len(jobs), "quality", unit="files"))
        for job in jobs:
            points.append(measured.point(job, folder))
            bar.advance(1, f"{job.name} {job.variant}")
    return QualityResult(source.path, texts, tuple(points), request.calibration.text)


def plan_quality(source: Checkpoint, request: QualityRequest) -> Needs:
    """What ``measure_quality`` takes; nothing is written. Raises what that would raise before its work."""
    return quality_needs(source, request, _checked(source, request))


def _checked(source: Checkpoint, request: QualityRequest) -> dict[str, NDArray[np.int64]]:
    """Token ids (N, T) of each text, by its label."""
    _check(request)
    ids = {label: _windows(source, path, request) for label, path in request.texts}
    for path in request.files:
        with registry.open_checkpoint(path) as candidate:
            check_comparable(source, candidate)
    return ids


def _check(request: QualityRequest) -> None:
    if not request.texts:
        raise UsageError("quality.nothing", "no --text is given to measure on", hint="pass one with --text FILE")
    if not (request.types or request.files):
        raise UsageError("quality.nothing", "no --types and no --file is given", hint="pass --types or --file")
    labels = [label for label, _ in request.texts]
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError("quality.label", f"two texts are called {label!r}", hint="write --text LABEL=FILE")
    for type in request.types:
        check_type("gguf", type)
    if request.sensitivity is not None and not request.calibration.is_asked:
        hint = "give the text with --calibration"
        raise UsageError("option.ignored", "--sensitivity has no effect without --calibration", hint=hint)


def _warn_of_chosen_text(request: QualityRequest) -> None:
    """Files on texts that their receipts name; and this run's own calibration and importance matrix."""
    measured = [path for _, path in request.texts]
    options = WriteOptions(calibration=request.calibration, gguf=GGUFOptions(imatrix=request.imatrix))
    warn_of_chosen_text(measured, options)
    for file in request.files:
        warn_of_text_in_receipt(measured, file)


def _windows(source: Checkpoint, path: Path, request: QualityRequest) -> NDArray[np.int64]:
    try:
        return read_sequences(path, source, samples=request.windows, length=request.length)
    except UsageError as error:
        if error.id != "calibration.short":
            raise
        hint = "pass a longer text, or a smaller --length"
        raise UsageError("quality.short", error.message, hint=hint) from None


def _jobs(source: Checkpoint, request: QualityRequest, folder: Path) -> Iterator[_Job]:
    chosen = _chosen(source, request)
    imatrix = request.imatrix or _collected(source, request, folder)
    for path in request.files:
        yield _Job(path.name, "file", path=path)
    for type in request.types:
        options = WriteOptions(type=type, gguf=GGUFOptions(imatrix=imatrix))
        yield _Job(type, "nearest" if imatrix is None else "imatrix", options)
        if request.calibration.is_asked:
            yield _Job(type, "calibration", WriteOptions(type=type, calibration=request.calibration))
        if type in chosen:
            yield _Job(type, "budget", chosen[type])


def _chosen(source: Checkpoint, request: QualityRequest) -> dict[str, WriteOptions]:
    """The best choice of types at the size of each type's calibrated file, if a table is given."""
    if request.sensitivity is None:
        return {}
    from gemma2tool.pipeline.budget.plan import budget_table, plan_budget

    options = WriteOptions(type=PLACEHOLDER, calibration=request.calibration)
    budget = Budget(sensitivity=request.sensitivity)
    table = budget_table(source, budget, options, threads=request.threads)
    chosen = {}
    for type in request.types:
        options = replace(options, type=type, name=f"{type}.gguf", single_file=True)
        size = make_plan(source, Path(f"{type}.gguf"), to="gguf", options=options).output.nbytes
        chosen[type] = plan_budget(source, table, replace(budget, target_size=size), options).options
    return chosen


def _collected(source: Checkpoint, request: QualityRequest, folder: Path) -> Path | None:
    """An importance matrix from the calibration text, if there is one."""
    from gemma2tool.pipeline.importance import collect_imatrix

    options, text = imatrix_options(source, request), request.calibration.text
    if options is None or text is None:
        return None
    return collect_imatrix(source, text, folder / "importance.gguf", options).out


@dataclass(frozen=True)
class _Measurement:
    """Measures files on token ids (N, T) by label."""

    source: Checkpoint
    ids: dict[str, NDArray[np.int64]]
    threads: int

    def point(self, job: _Job, folder: Path) -> QualityPoint:
        if job.options is None:
            assert job.path is not None
            return self._point(job, job.path)
        from gemma2tool.pipeline.conversion import save

        path = folder / f"{job.name}.gguf"
        save(self.source, path, job.options, to="gguf", threads=self.threads)
        try:
            return self._point(job, path)
        finally:
            path.unlink()

    def _point(self, job: _Job, path: Path) -> QualityPoint:
        with registry.open_checkpoint(path) as candidate:
            kl = {
                label: _estimate(window_divergence(self.source, candidate, ids, threads=self.threads))
                for label, ids in self.ids.items()
            }
            nbytes = candidate.file_bytes
            return QualityPoint(job.name, job.variant, nbytes, 8 * nbytes / candidate.parameters, kl)


def _estimate(kl: NDArray[np.float64]) -> Estimate:
    return Estimate(float(kl.mean()), *bootstrap_interval(kl))
