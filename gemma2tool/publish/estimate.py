"""What a release will take: files and their sizes, passes over the source, time. Known before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gemma2tool.errors import UsageError
from gemma2tool.pipeline.calibration.cost import product_rate
from gemma2tool.pipeline.calibration.text import LENGTH, SAMPLES
from gemma2tool.pipeline.layer_by_layer import pass_count
from gemma2tool.pipeline.plan import Plan, make_plan
from gemma2tool.publish.names import format_of
from gemma2tool.publish.plan import Output, Release
from gemma2tool.storage.units import human_bytes, human_seconds

EFFICIENCY = 0.5
"""Fraction of the speed of one large matrix product that a forward pass reaches."""
LOGIT_OPERATIONS = 200.0
"""Operations of a matrix product that take as long as comparing one logit of two models, in double precision."""
VALUE_OPERATIONS = 4000.0
"""As many as take as long as encoding a value, reading it back and comparing it."""
_CALIBRATION_PASSES = {"layer": 1, "model": 3}
"""Over the layers, by what errors are weighed by: the gradients take one forward and one backward."""
READER_SECONDS = 4.0
"""For the library that reads an output in a process of its own, to start."""


@dataclass(frozen=True)
class PlannedFile:
    """An output: ``nbytes`` is None where its layout depends on an importance matrix that is yet to be collected."""

    name: str
    type: str
    nbytes: int | None
    finished: bool


@dataclass(frozen=True)
class ReleasePlan:
    """``passes``: how often the source is read, and ``bytes_read`` by them. ``bytes_written``: of what is missing;
    ``peak_bytes``: on the disk at one time. ``seconds``: roughly, of its arithmetic. ``text``: what quality is measured
    on. ``upload_to``: a repository.
    """

    folder: Path
    files: tuple[PlannedFile, ...]
    remote: bool
    passes: int
    bytes_read: int
    bytes_written: int
    peak_bytes: int
    free_bytes: int
    seconds: float
    text: str
    upload_to: str | None = None

    def lines(self) -> list[str]:
        """For people, after the table of files."""
        missing = [file for file in self.files if not file.finished]
        if not missing:
            return ["everything is there; the card and the checksums are written again"]
        room = "" if self.peak_bytes <= self.free_bytes else ": NOT ENOUGH"
        lines = [
            f"writes {human_bytes(self.bytes_written)}, needs {human_bytes(self.peak_bytes)} of"
            f" {human_bytes(self.free_bytes)} free{room}",
            f"reads the source {self.passes} times ({human_bytes(self.bytes_read)}"
            + (" to download; --keep-download FOLDER downloads it once)" if self.remote else ")"),
            f"measures on {self.text}",
            f"takes about {human_seconds(max(self.seconds, 1))} of computing, and the time to read and write",
        ]
        if self.upload_to is not None:
            lines.append(f"uploads to hf://{self.upload_to}: the files above, their receipts, checksums, README.md")
        return lines

    def to_json(self) -> dict[str, object]:
        """The plan as ``--dry-run --json`` prints it."""
        return {
            "folder": str(self.folder),
            "files": [
                {"name": file.name, "type": file.type, "bytes": file.nbytes, "finished": file.finished}
                for file in self.files
            ],
            "passes": self.passes,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "peak_bytes": self.peak_bytes,
            "free_bytes": self.free_bytes,
            "estimated_seconds": round(self.seconds, 1),
            "upload_to": self.upload_to,
        }


def estimate(
    opened: Release, missing: Sequence[Output], *, upload_to: str | None = None, discard: bool = False
) -> ReleasePlan:
    """What a release will take whose outputs ``missing`` are to be written. ``discard``: in passes of their own, and
    each is removed after it.
    """
    request, outputs = opened.request, opened.outputs()
    threads, folder = request.run.threads, request.folder
    unfinished = {output.path for output in missing}
    plans = {output.path: _plan(opened, output) for output in outputs}
    files = tuple(
        PlannedFile(output.path.name, output.type, _nbytes(plans[output.path]), output.path not in unfinished)
        for output in outputs
    )
    sizes = [_nbytes(plans[output.path]) or 0 for output in missing]
    source_bytes = sum(tensor.nbytes for tensor in opened.source.tensors.values())
    passes = (len(missing) if discard else bool(missing)) + len(missing) * _verification_passes(opened)
    operations = _verification_operations(opened) * len(missing)
    if (matrix := opened.release_imatrix) is not None and not matrix.exists():
        passes += pass_count(opened.source.config, SAMPLES, LENGTH)
        operations += 2.0 * opened.source.parameters * SAMPLES * LENGTH / EFFICIENCY
    seconds = operations / (product_rate() * threads) + READER_SECONDS * len(missing)
    for output in missing:
        plan = plans[output.path]
        if plan is not None and plan.cost is not None:
            passes += _CALIBRATION_PASSES[plan.cost.hessian]
            seconds += plan.cost.seconds
    return ReleasePlan(
        folder=folder,
        files=files,
        remote=opened.source.pinned is not None,
        passes=passes,
        bytes_read=passes * source_bytes,
        bytes_written=sum(sizes),
        peak_bytes=max(sizes, default=0) if discard else sum(sizes),
        free_bytes=shutil.disk_usage(_existing(folder)).free,
        seconds=seconds,
        text=opened.sentence(),
        upload_to=upload_to,
    )


def _verification_passes(opened: Release) -> int:
    """How often the source is read to verify an output: for the values, and for the forward passes."""
    from gemma2tool.verify.compare.logits import passes

    return 1 + passes(opened.ids, opened.source.config)


def _verification_operations(opened: Release) -> float:
    """Operations of a matrix product that take as long as encoding and verifying an output: the forward passes of both
    models over the text and the probe, and what is done with each logit and value.
    """
    source, tokens = opened.source, int(opened.ids.size + opened.ids.shape[1])
    forward = 2 * 2.0 * source.parameters * tokens / EFFICIENCY
    return forward + LOGIT_OPERATIONS * tokens * source.config.vocab_size + VALUE_OPERATIONS * source.parameters


def _plan(opened: Release, output: Output) -> Plan | None:
    """The layout of an output, as far as it can be told without an importance matrix that is yet to be collected."""
    options, matrix = output.options, output.options.gguf.imatrix
    is_missing = matrix is not None and matrix == opened.release_imatrix and not matrix.exists()
    if is_missing:
        options = replace(options, gguf=replace(options.gguf, imatrix=None))
    is_file = output.path.suffix == ".gguf"
    options = replace(options, type=output.type, name=output.path.name, single_file=is_file)
    threads = opened.request.run.threads
    try:
        return make_plan(opened.source, output.path, to=format_of(output.type), options=options, threads=threads)
    except UsageError:
        if is_missing:
            return None
        raise


def _nbytes(plan: Plan | None) -> int | None:
    return None if plan is None else plan.output.nbytes


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place
