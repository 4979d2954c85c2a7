"""What a release will take: files and their sizes, passes over the source, time. Known before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gemma2tool.errors import UsageError
from gemma2tool.pipeline.fingerprint import PLAN, settings
from gemma2tool.pipeline.importance import BATCH
from gemma2tool.pipeline.leftovers import changing_bytes, is_to_download, refuse_other_leftovers
from gemma2tool.pipeline.needs.conversion import Verified, conversion_needs
from gemma2tool.pipeline.needs.needs import Needs, together
from gemma2tool.pipeline.needs.texts import imatrix_needs
from gemma2tool.pipeline.plan import Plan, make_plan
from gemma2tool.publish.modelfiles import check_modelfiles
from gemma2tool.publish.names import format_of
from gemma2tool.publish.plan import Output, Release
from gemma2tool.storage.staging.resume import check_leftovers
from gemma2tool.storage.units import human_bytes


@dataclass(frozen=True)
class PlannedFile:
    """An output: ``nbytes`` is None where its layout depends on an importance matrix that is yet to be collected."""

    name: str
    type: str
    nbytes: int | None
    finished: bool


@dataclass(frozen=True)
class ReleasePlan:
    """What a release would write.

    - ``needs``: what writing the missing files needs.
    - ``bytes_written``: the size of all missing files together; with ``--discard-uploaded``, the disk holds less at one
      time.
    - ``text``: the text that quality is measured on.
    - ``upload_to``: the repository to upload to, if any.
    """

    folder: Path
    files: tuple[PlannedFile, ...]
    needs: Needs
    bytes_written: int
    text: str
    upload_to: str | None = None

    def lines(self) -> list[str]:
        """Return lines for people, to print before the table of files."""
        if all(file.finished for file in self.files):
            return ["everything is there; the card and the checksums are written again"]
        lines = [*self.needs.lines(), f"measures on {self.text}"]
        if self.upload_to is not None:
            size = human_bytes(self.bytes_written)
            others = "receipts, checksums and README.md"
            lines.append(f"uploads {size} to hf://{self.upload_to}: what is missing of the outputs, {others}")
        return lines

    def to_json(self) -> dict[str, object]:
        """Return the plan as ``--dry-run --json`` prints it."""
        return {
            "folder": str(self.folder),
            "files": [
                {"name": file.name, "type": file.type, "bytes": file.nbytes, "finished": file.finished}
                for file in self.files
            ],
            "bytes_written": self.bytes_written,
            "needs": self.needs.to_json(),
            "upload_to": self.upload_to,
        }


def estimate(
    opened: Release, missing: Sequence[Output], *, upload_to: str | None = None, discard: bool = False
) -> ReleasePlan:
    """What a release will take whose outputs ``missing`` are to be written. ``discard``: in passes of their own, and
    each is removed after it.

    Raises ``UsageError`` for what cannot be continued or replaced, ``ResourceError`` for what another process writes.
    """
    request, outputs = opened.request, opened.outputs()
    unfinished = {output.path for output in missing}
    plans = {output.path: _plan(opened, output) for output in outputs}
    for output in missing:
        _check_leftovers(opened, output, plans[output.path])
    check_modelfiles(opened)
    files = tuple(
        PlannedFile(output.path.name, output.type, _nbytes(plans[output.path]), output.path not in unfinished)
        for output in outputs
    )
    known = [plan for output in missing if (plan := plans[output.path]) is not None]
    written = sum(plan.output.nbytes for plan in known)
    return ReleasePlan(
        folder=request.folder,
        files=files,
        needs=_needs(opened, known, len(missing), discard=discard),
        bytes_written=written,
        text=opened.sentence(),
        upload_to=upload_to,
    )


def _check_leftovers(opened: Release, output: Output, plan: Plan | None) -> None:
    """``plan``: None, or without the importance matrix, where that is yet to be collected."""
    run = opened.request.run
    if plan is not None and not _waits(opened, output):
        refuse_other_leftovers([plan], run)
    elif not is_to_download(opened.source, run):
        known = settings(opened.source, "gguf", output.written, changing_bytes(run))
        check_leftovers(output.path, known, unknown=(PLAN,), restart=run.restart)


def _needs(opened: Release, plans: Sequence[Plan], count: int, *, discard: bool) -> Needs:
    """Of ``count`` outputs, of which ``plans`` are known already. ``discard``: see ``estimate``."""
    source, folder, threads = opened.source, opened.request.folder, opened.request.run.threads
    verified = Verified((opened.ids.shape[0], opened.ids.shape[1]), count - len(plans))
    if discard and plans:
        alone = [
            conversion_needs(source, [plan], folder, replace(verified, others=0), threads=threads) for plan in plans
        ]
        needs = replace(together(alone), disk=max(part.disk for part in alone))
    else:
        needs = conversion_needs(source, plans, folder, verified, threads=threads)
    if count and (collected := opened.imatrix_to_collect()) is not None:
        chunks, _ = collected
        shape = chunks.shape[0], chunks.shape[1]
        needs = together([imatrix_needs(source, shape, folder, batch=BATCH, threads=threads), needs])
    return needs


def _plan(opened: Release, output: Output) -> Plan | None:
    """The layout of an output, as far as it can be told without an importance matrix that is yet to be collected."""
    waits, is_file = _waits(opened, output), output.path.suffix == ".gguf"
    options = replace(output.written, name=output.path.name, single_file=is_file)
    if waits:
        options = replace(options, gguf=replace(options.gguf, imatrix=None))
    threads = opened.request.run.threads
    try:
        return make_plan(opened.source, output.path, to=format_of(output.type), options=options, threads=threads)
    except UsageError:
        if waits:
            return None
        raise


def _waits(opened: Release, output: Output) -> bool:
    """Whether its importance matrix is yet to be collected."""
    matrix = output.options.gguf.imatrix
    return matrix is not None and matrix == opened.release_imatrix and not matrix.exists()


def _nbytes(plan: Plan | None) -> int | None:
    return None if plan is None else plan.output.nbytes
