"""Carries out a release: what is missing in its folder is written, verified and measured; then checksums and card."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from gemma2tool.errors import InputRefused
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.pipeline import conversion, importance
from gemma2tool.pipeline.leftovers import remove_leftovers
from gemma2tool.pipeline.opening import open_source
from gemma2tool.pipeline.report_files import replace_report
from gemma2tool.pipeline.run import ConversionResult
from gemma2tool.publish.card import Card, CardEntry
from gemma2tool.publish.estimate import ReleasePlan, estimate
from gemma2tool.publish.modelfiles import write_modelfiles
from gemma2tool.publish.names import CARD, CHECKSUMS, repository_name
from gemma2tool.publish.plan import RECORD, Output, Release, check_request, open_release
from gemma2tool.publish.request import ReleaseRequest, ReleaseResult
from gemma2tool.publish.texts import described
from gemma2tool.receipt.bom import Revision, license_of
from gemma2tool.receipt.document import SUFFIX, Receipt, read_receipt, receipt_path
from gemma2tool.receipt.files import digest_file
from gemma2tool.storage.syscalls import translate_os_errors

logger = logging.getLogger("gemma2tool")

_MEANWHILE = ".gemma2tool-release"
"""The folder in a release's folder for texts and token ids; removed when the release is done."""


def release(request: ReleaseRequest, progress: Progress | None = None) -> ReleaseResult:
    """Write what is missing of a release.

    Raises ``UsageError`` for a request that cannot be carried out and for files that are in the way, ``InputRefused``
    for a source that cannot be read. An output that fails its verification is in the result, and not in the folder.
    """
    with opened_release(request, progress) as opened:
        missing = opened.missing()
        announce(opened, estimate(opened, missing))
        if collect_imatrix(opened, progress):
            missing = opened.missing()
        results = write_outputs(opened, missing, progress)
        files = finish(opened, repository=None)
    return ReleaseResult(request.folder, files, results)


@contextmanager
def opened_release(request: ReleaseRequest, progress: Progress | None = None) -> Iterator[Release]:
    """The release with its source open and its folder made."""
    check_request(request)
    folder = request.folder
    with translate_os_errors(folder, "creating the folder"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MEANWHILE).mkdir(exist_ok=True)
    try:
        with _opened(request, folder / _MEANWHILE, progress) as opened:
            yield opened
    finally:
        shutil.rmtree(folder / _MEANWHILE, ignore_errors=True)
        with suppress(OSError):  # rmdir refuses a folder that is not empty
            folder.rmdir()


@contextmanager
def planned_release(request: ReleaseRequest) -> Iterator[Release]:
    """The release with its source open; nothing is written, and no source is downloaded."""
    check_request(request)
    request = replace(request, run=replace(request.run, keep_download=None))
    with tempfile.TemporaryDirectory(prefix="gemma2tool-release-") as folder, _opened(request, Path(folder)) as opened:
        yield opened


@contextmanager
def _opened(request: ReleaseRequest, folder: Path, progress: Progress | None = None) -> Iterator[Release]:
    """``folder``: for files that are needed meanwhile."""
    with ExitStack() as stack:
        source = request.source
        if not isinstance(source, Checkpoint):
            keep, place = request.run.keep_download, request.folder if request.folder.is_dir() else None
            opened = open_source(source, request.config, place=place, keep=keep, progress=progress)
            source = stack.enter_context(opened)
        merged = conversion.with_adapters(source, request.adapters, stack)
        yield open_release(request, source, folder, merged)


def announce(opened: Release, plan: ReleasePlan) -> None:
    """Say in the log what a run will take; raises ``ResourceError`` if its memory or its disk is not there."""
    if all(file.finished for file in plan.files):
        return
    plan.needs.check(opened.request.run.device)
    staged = (remove_leftovers(output.path, dry_run=True) for output in opened.outputs())
    plan.needs.check_disk(opened.request.folder, there=sum(left.nbytes for one in staged for left in one))
    for line in plan.lines():
        logger.info("%s", line)


def write_outputs(
    opened: Release, outputs: Sequence[Output], progress: Progress | None
) -> tuple[ConversionResult, ...]:
    """Write outputs in one pass over the source, verify each, and measure it."""
    if not outputs:
        logger.info("%s: everything is there", opened.request.folder)
        return ()
    return conversion.convert(opened.conversion(tuple(outputs)), progress)


def finish(opened: Release, *, repository: str | None, elsewhere: Sequence[Path] = ()) -> tuple[str, ...]:
    """Write the card and the checksums of what is finished, and return the paths of all files below the folder.
    ``elsewhere``: outputs that were uploaded and are no longer here.
    """
    folder = opened.request.folder
    entries = finished_entries(opened, elsewhere)
    if not entries:
        return ()
    modelfiles = write_modelfiles(opened, [entry.name for entry in entries])
    sums = dict(_digests(opened, entries, modelfiles))
    replace_report(folder / CARD, card(opened, entries, repository, modelfiles).markdown())
    replace_report(folder / CHECKSUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
    return (*sorted(sums), CARD, CHECKSUMS)


def finished_entries(opened: Release, elsewhere: Sequence[Path] = ()) -> list[CardEntry]:
    """Every output of this release in its folder, also of earlier runs with other types; the smallest first."""
    entries = []
    for place in sorted(opened.request.folder.glob(f"*{SUFFIX}")):
        output = place.with_name(place.name.removesuffix(SUFFIX))
        record = _record(place)
        if record is None or not (output.exists() or output in elsewhere):
            continue
        receipt, about = record
        if (about.get("source"), about.get("model")) == (opened.identity, opened.model):
            entries.append(CardEntry(output.name, str(about.get("type")), receipt))
    return sorted(entries, key=lambda entry: (entry.receipt.nbytes, entry.name))


def _record(place: Path) -> tuple[Receipt, dict[str, object]] | None:
    """A receipt with what it says of a release, if it is of one."""
    with suppress(InputRefused):
        receipt = read_receipt(place)
        about = receipt.content["plan"].get("recipe", {}).get(RECORD)
        if isinstance(about, dict):
            return receipt, about
    return None


def _digests(opened: Release, entries: Sequence[CardEntry], modelfiles: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """The files of a release below its folder, and their SHA-256: of outputs as their receipts have them."""
    folder = opened.request.folder
    for entry in entries:
        yield from entry.digests()
        place = receipt_path(folder / entry.name)
        yield place.name, digest_file(place, place.name).sha256
    for place in modelfiles:
        yield place.name, digest_file(place, place.name).sha256
    matrix = opened.release_imatrix
    if matrix is not None and matrix.exists():
        yield matrix.name, digest_file(matrix, matrix.name).sha256


def card(
    opened: Release, entries: Sequence[CardEntry], repository: str | None, modelfiles: Sequence[Path] = ()
) -> Card:
    """The card of what is finished."""
    request, source = opened.request, opened.source
    asked = request.card
    own = _repository(source)
    base = repository_name(asked.base_model, "--base-model") if asked.base_model else own
    other = bool(request.adapters) or own not in (None, base)
    if base is None:
        logger.warning("the card names no base model: pass it with --base-model ORG/NAME")
    by = asked.quantized_by or (repository.partition("/")[0] if repository else None)
    return Card(
        model=opened.model,
        entries=entries,
        adapters=tuple(f"{adapter.path.name} ({adapter.scale:g})" for adapter in request.adapters),
        license=asked.license or license_of(source) or "gemma",
        base_model=base,
        relation=asked.relation or ("finetune" if other else "quantized"),
        quantized_by=by,
        repository=repository,
        made=_made(opened),
        text=opened.sentence(),
        imatrix=opened.release_imatrix.name if opened.release_imatrix is not None else None,
        modelfiles=tuple(path.name for path in modelfiles),
    )


def _repository(source: Checkpoint) -> str | None:
    """The repository on the hub that a source is from, if it is known."""
    if source.pinned is not None and source.pinned.startswith("hf://"):
        return source.pinned.removeprefix("hf://").partition("@")[0]
    snapshot = Revision.of_snapshot(source.path)
    return f"{snapshot.group}/{snapshot.name}" if snapshot else None


def _made(opened: Release) -> str:
    request = opened.request
    if opened.calibration is not None:
        return (
            "The source was quantized in one step. Codes and scales of quantized matrices were chosen by what the model"
            f" does with {described(request.calibration or '')} (error feedback by a Hessian of each matrix's inputs)."
        )
    if opened.imatrix is not None:
        text = "" if request.imatrix_text is None else f" collected from {described(request.imatrix_text)}"
        return (
            "The source was quantized in one step. Codes of the GGUF types were chosen with an importance"
            f" matrix{text}; those of other types were rounded to nearest."
        )
    return "The source was quantized in one step, rounding to nearest."


def collect_imatrix(opened: Release, progress: Progress | None) -> bool:
    """Collect the importance matrix of a release if it has one that is not there from an earlier run; whether this was
    done.
    """
    place, request, source = opened.release_imatrix, opened.request, opened.source
    needed = opened.imatrix_to_collect()
    if place is None or needed is None:
        return False
    chunks, dataset = needed
    with progress_or_null(progress, chunks.size, "importance matrix", unit="tokens") as bar:
        sums = importance.collect(
            source, chunks, threads=request.run.threads, folder=opened.folder, advance=bar.advance
        )
    importance.CollectedMatrix.of(source.config, sums, dataset, chunks.shape).write(place, force=request.run.force)
    return True
