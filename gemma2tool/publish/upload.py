"""Uploads what is finished of a release to a repository on the Hugging Face hub.

An output goes there in one commit, with its receipt, and only with the bytes that its receipt states; the card, the
checksums and the importance matrix in a last one. What the repository has already is not sent again, so a run after any
interruption ends with every file there once.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.model.progress import Progress
from gemma2tool.pipeline.modelfile import SUFFIX as MODELFILE
from gemma2tool.pipeline.report_files import replace_report
from gemma2tool.pipeline.run import ConversionResult
from gemma2tool.publish.card import CardEntry
from gemma2tool.publish.estimate import ReleasePlan, estimate
from gemma2tool.publish.hub import LocalFile, Target, local_file
from gemma2tool.publish.names import CARD, CHECKSUMS, repository_name
from gemma2tool.publish.plan import Output, Release, check_request
from gemma2tool.publish.release import (
    announce,
    collect_imatrix,
    finish,
    finished_entries,
    opened_release,
    planned_release,
    write_outputs,
)
from gemma2tool.publish.request import PublishRequest, ReleaseResult
from gemma2tool.receipt.document import SUFFIX, receipt_path
from gemma2tool.sources.remote import Digest

logger = logging.getLogger("gemma2tool")

UPLOADED = ".gemma2tool-uploaded.json"
"""In a release's folder: outputs that were uploaded and removed, with the digests of their files on the hub."""

MAX_BYTES = 16 << 20


def publish(request: PublishRequest, progress: Progress | None = None) -> ReleaseResult:
    """Write what is missing of a release, and upload what is finished.

    Raises ``InputRefused`` (``publish.refused``) where the hub does not accept it, ``ResourceError`` where it cannot be
    reached; the same request continues. Files of the repository that the release does not have are left as they are.
    """
    target = Target(repository_name(request.to, "--to"))
    check_request(request.release)
    remote = target.files()
    _refuse_other_card(target, remote, force=request.release.run.force)
    target.create(private=request.private)  # also shows, before the long work, that this may be written to
    with opened_release(request.release, progress) as opened:
        upload = _Upload(request, opened, target, remote)
        gone = upload.elsewhere()
        missing = opened.missing(gone)
        announce(opened, estimate(opened, missing, upload_to=target.name, discard=request.discard))
        if collect_imatrix(opened, progress):
            missing = opened.missing(gone)
        results = upload.outputs(missing, gone, progress)
        files = finish(opened, repository=target.name, elsewhere=upload.elsewhere())
        if files:
            upload.send_rest(files)
    return ReleaseResult(request.release.folder, files, results, tuple(upload.uploaded), target.name)


def plan_publish(request: PublishRequest) -> ReleasePlan:
    """What would be written and uploaded. The hub is asked what is there."""
    target = Target(repository_name(request.to, "--to"))
    with planned_release(request.release) as opened:
        missing = opened.missing(_Upload(request, opened, target, target.files()).elsewhere())
        return estimate(opened, missing, upload_to=target.name, discard=request.discard)


@dataclass
class _Upload:
    """A release on its way to a repository that has the files ``remote``."""

    request: PublishRequest
    opened: Release
    target: Target
    remote: dict[str, Digest]
    uploaded: list[str] = field(default_factory=list)
    sent: set[str] = field(default_factory=set)

    @property
    def folder(self) -> Path:
        return self.opened.request.folder

    def outputs(
        self, missing: Sequence[Output], gone: Sequence[Path], progress: Progress | None
    ) -> tuple[ConversionResult, ...]:
        """Write what is missing, in one pass or, where outputs are removed after it, in one for each; upload each.
        ``gone``: see ``elsewhere``.
        """
        for path in gone:
            _remove(path)  # what an interrupted removal left
        self._send_finished(missing)
        results: list[ConversionResult] = []
        for outputs in [(output,) for output in missing] if self.request.discard else [missing]:
            results += write_outputs(self.opened, outputs, progress)
            self._send_finished(missing[len(results) :])
        return tuple(results)

    def send_rest(self, files: Sequence[str]) -> None:
        """Upload what is of no single output, of the ``files`` of the release."""
        names = [CARD, CHECKSUMS]
        if self.opened.release_imatrix is not None:
            names.insert(0, self.opened.release_imatrix.name)
        names += [name for name in files if name.endswith(MODELFILE) and "/" not in name]
        self._send({name: local_file(self.folder / name) for name in names}, "Add the card and the checksums")

    def elsewhere(self) -> tuple[Path, ...]:
        """The outputs that were uploaded and removed, and still are in the repository."""
        gone = []
        for name, files in self._records().items():
            if files and all(self.remote.get(path) == digest for path, digest in files.items()):
                gone.append(self.folder / name)
        return tuple(gone)

    def _send_finished(self, missing: Sequence[Output]) -> None:
        """Upload the outputs that are in the folder, but those that are still to be written."""
        gone, unfinished = set(self.elsewhere()), {output.path for output in missing}
        for entry in finished_entries(self.opened):
            path = self.folder / entry.name
            if entry.name in self.sent or path in gone or path in unfinished:
                continue
            files = dict(_files(entry, self.folder))
            self._send(files, f"Add {entry.name}")
            self.sent.add(entry.name)
            if self.request.discard:
                self._discard(path, files)

    def _send(self, files: dict[str, LocalFile], message: str) -> None:
        changed = {name: file for name, file in files.items() if not file.is_at(self.remote.get(name))}
        if not changed:
            return
        self.target.upload(changed, message)
        logger.info("%s: uploaded %s", self.target.address, ", ".join(changed))
        self.remote |= {name: Digest("sha256", file.sha256) for name, file in changed.items()}
        self.uploaded += changed

    def _discard(self, path: Path, files: dict[str, LocalFile]) -> None:
        """Remove an output once the hub says that it has all of it."""
        self.remote = self.target.files()
        absent = [name for name, file in files.items() if not file.is_at(self.remote.get(name))]
        if absent:
            raise InputRefused("publish.refused", f"{self.target.address}: does not have {absent[0]} after its upload")
        records = {name: dict(digests) for name, digests in self._records().items()}
        records[path.name] = {name: self.remote[name] for name in files if name != receipt_path(path).name}
        content = {"repository": self.target.name, "outputs": records}
        replace_report(self.folder / UPLOADED, json.dumps(content, indent=1) + "\n")
        _remove(path)

    def _records(self) -> dict[str, dict[str, Digest]]:
        """The outputs that were removed after they were uploaded to this repository: their files there."""
        place = self.folder / UPLOADED
        if not place.is_file():
            return {}
        content = strict_json.load(place, what="list of uploaded files", max_bytes=MAX_BYTES)
        if not isinstance(content, dict) or content.get("repository") != self.target.name:
            return {}
        try:
            return {
                str(name): {str(path): Digest(*map(str, digest)) for path, digest in files.items()}
                for name, files in content["outputs"].items()
            }
        except (KeyError, TypeError, AttributeError, ValueError):
            return {}


def _files(entry: CardEntry, folder: Path) -> Iterator[tuple[str, LocalFile]]:
    """The files of an output and its receipt, by their paths in the repository; as the receipt states them."""
    for name, sha256 in entry.digests():
        yield name, LocalFile(folder / name, sha256)
    place = receipt_path(folder / entry.name)
    yield place.name, local_file(place)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _refuse_other_card(target: Target, remote: dict[str, Digest], *, force: bool) -> None:
    """A card beside which there is no receipt is somebody's own."""
    if CARD in remote and not force and not any(name.endswith(SUFFIX) for name in remote):
        raise UsageError("publish.card", f"{target.address}: has a {CARD} that is not of a release")
