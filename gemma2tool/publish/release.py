"""Carries out a release: what is missing in its folder is written, verified and measured; then checksums and card."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.gguf.imatrix import read_imatrix
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.pipeline import conversion, importance
from gemma2tool.pipeline.calibration.text import LENGTH, SAMPLES
from gemma2tool.pipeline.opening import open_source
from gemma2tool.pipeline.prompt import PromptTokenizer
from gemma2tool.pipeline.report_files import replace_report
from gemma2tool.pipeline.run import ConversionResult
from gemma2tool.pipeline.sensitivity.windows import describe
from gemma2tool.publish.card import NAME as CARD
from gemma2tool.publish.card import Card, CardEntry
from gemma2tool.publish.plan import RECORD, Output, Release, check_request, open_release
from gemma2tool.publish.request import ReleaseRequest, ReleaseResult
from gemma2tool.publish.texts import described, text_file
from gemma2tool.receipt.bom import Revision, license_of
from gemma2tool.receipt.document import SUFFIX, Receipt, read_receipt, receipt_path
from gemma2tool.receipt.files import digest_file
from gemma2tool.storage.syscalls import translate_os_errors
from gemma2tool.storage.text_file import read_text

logger = logging.getLogger("gemma2tool")

CHECKSUMS = "SHA256SUMS"
_MEANWHILE = ".gemma2tool-release"
"""The folder in a release's folder for texts and token ids; removed when the release is done."""


def release(request: ReleaseRequest, progress: Progress | None = None) -> ReleaseResult:
    """Write what is missing of a release.

    Raises ``UsageError`` for a request that cannot be carried out and for files that are in the way, ``InputRefused``
    for a source that cannot be read. An output that fails its verification is in the result, and not in the folder.
    """
    with opened_release(request, progress) as opened:
        results = write_outputs(opened, opened.missing(), progress)
        files = finish(opened, repository=None)
    return ReleaseResult(request.folder, files, results)


@contextmanager
def opened_release(request: ReleaseRequest, progress: Progress | None = None) -> Iterator[Release]:
    """The release with its source open and its folder made; the importance matrix is collected if one is asked for."""
    check_request(request)
    folder = request.folder
    with translate_os_errors(folder, "creating the folder"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MEANWHILE).mkdir(exist_ok=True)
    try:
        with _source(request, progress) as source:
            opened = open_release(request, source, folder / _MEANWHILE)
            if opened.release_imatrix is not None:
                _collect_imatrix(opened, opened.release_imatrix, progress)
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
    with tempfile.TemporaryDirectory(prefix="gemma2tool-release-") as folder, _source(request, None) as source:
        yield open_release(request, source, Path(folder))


@contextmanager
def _source(request: ReleaseRequest, progress: Progress | None) -> Iterator[Checkpoint]:
    if isinstance(request.source, Checkpoint):
        yield request.source
        return
    keep, place = request.run.keep_download, request.folder if request.folder.is_dir() else None
    with open_source(request.source, request.config, place=place, keep=keep, progress=progress) as source:
        yield source


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
    sums = dict(_digests(opened, entries))
    replace_report(folder / CARD, card(opened, entries, repository).markdown())
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


def _digests(opened: Release, entries: Sequence[CardEntry]) -> Iterator[tuple[str, str]]:
    """The files of a release below its folder, and their SHA-256: of outputs as their receipts have them."""
    folder = opened.request.folder
    for entry in entries:
        yield from entry.digests()
        place = receipt_path(folder / entry.name)
        yield place.name, digest_file(place, place.name).sha256
    matrix = opened.release_imatrix
    if matrix is not None and matrix.exists():
        yield matrix.name, digest_file(matrix, matrix.name).sha256


def card(opened: Release, entries: Sequence[CardEntry], repository: str | None) -> Card:
    """The card of what is finished."""
    asked, source = opened.request.card, opened.source
    base = asked.base_model or _repository(source)
    if base is None:
        logger.warning("the card names no base model: give it with --base-model ORG/NAME")
    by = asked.quantized_by or (repository.partition("/")[0] if repository else None)
    return Card(
        model=opened.model,
        entries=entries,
        license=asked.license or license_of(source) or "gemma",
        base_model=base,
        quantized_by=by,
        repository=repository,
        made=_made(opened),
        text=opened.sentence(),
        imatrix=opened.release_imatrix.name if opened.release_imatrix is not None else None,
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


def _collect_imatrix(opened: Release, place: Path, progress: Progress | None) -> None:
    """Collect the importance matrix of a release, unless it is there from an earlier run."""
    request, source = opened.request, opened.source
    assert request.imatrix_text is not None
    text = text_file(request.imatrix_text, "calibration", opened.folder)
    ids = PromptTokenizer(source).encode(read_text(text, what="text"))
    size = min(LENGTH, source.config.max_position_embeddings)
    chunks = importance.chunks_of(ids, size, source.config.bos_token_id, SAMPLES)
    dataset = f"{text.name}, tokens {describe(text, chunks).sha256[:16]}, of {opened.identity}"
    if place.exists():
        with suppress(InputRefused):
            if read_imatrix(place).dataset == dataset:
                return
        if not request.run.force:
            raise UsageError("release.other", f"{place}: is there, and is of another text or source")
    with progress_or_null(progress, chunks.size, "importance matrix", unit="tokens") as bar:
        sums = importance.collect(source, chunks, threads=request.run.threads, advance=bar.advance)
    importance.write(place, source, sums, dataset=dataset, chunks=chunks, force=request.run.force)
