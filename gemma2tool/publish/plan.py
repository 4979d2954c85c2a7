"""What a release will hold: its outputs with their names, options and records, and which of them are finished."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats import packings
from gemma2tool.formats.options import Calibration, GGUFOptions, WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline import receipts
from gemma2tool.pipeline.calibration.text import read_sequences
from gemma2tool.pipeline.fingerprint import source_identity
from gemma2tool.pipeline.output_names import FLOAT_DTYPES, check_type
from gemma2tool.pipeline.requests import Checks, ConversionRequest, OutputRequest
from gemma2tool.pipeline.sensitivity.table import Text
from gemma2tool.pipeline.sensitivity.windows import ALL, describe
from gemma2tool.publish.names import check_template, format_of, model_name, output_name
from gemma2tool.publish.request import ReleaseRequest
from gemma2tool.publish.texts import described, text_file
from gemma2tool.quantizers.mixtures import file_type
from gemma2tool.receipt.document import Receipt, read_receipt, receipt_path
from gemma2tool.receipt.files import digest_files, file_names
from gemma2tool.storage.staging import place as staging_place

RECORD = "release"
"""The key of a release's record among what a receipt's recipe says."""


@dataclass(frozen=True)
class Output:
    """One output of a release: its ``path`` in the folder, the ``type`` it was asked for, and how it is written.
    ``record``: what its receipt says of the release.
    """

    path: Path
    type: str
    options: WriteOptions
    record: Mapping[str, Any]

    @property
    def request(self) -> OutputRequest:
        return OutputRequest(destination=self.path, types=(self.type,), options=self.options, recipe=self.record)

    def finished(self, *, force: bool, threads: int) -> Receipt | None:
        """Its receipt if it is in place and what would be written; None if it is to be written.

        Raises ``UsageError`` (``release.other``) for another output of its name, unless ``force`` says that it may be
        replaced.
        """
        if staging_place.exists(self.path) or not self.path.exists():
            return None
        try:
            return self._checked(threads)
        except UsageError:
            if not force:
                raise
            return None

    def _checked(self, threads: int) -> Receipt:
        receipt = self.own_receipt()
        if receipt is None:
            raise UsageError("release.other", f"{self.path}: is there, with no receipt of this release")
        if list(receipt.files) != digest_files(self.path, file_names(self.path), threads=threads):
            raise UsageError("release.other", f"{self.path}: is there, and is not what its receipt describes")
        return receipt

    def own_receipt(self) -> Receipt | None:
        """Its receipt, if there is one, of the same source, options and text; whether its files are there or not."""
        place = receipt_path(self.path)
        with suppress(InputRefused):
            if place.is_file():
                receipt = read_receipt(place)
                plan = receipt.content["plan"]
                same = (plan.get("recipe"), plan["options"]) == (self.record, receipts.options(self._written))
                return receipt if same else None
        return None

    @property
    def _written(self) -> WriteOptions:
        return WriteOptions(
            type=self.type, gguf=self.options.gguf, calibration=self.options.calibration, packing=self.options.packing
        )


@dataclass(frozen=True)
class Release:
    """A request with its source open. ``ids``: token ids (N, T) that quality is measured on, ``text``: what they are.
    ``identity``: of the source. ``imatrix``: where the importance matrix is, or will be.
    """

    request: ReleaseRequest
    source: Checkpoint
    model: str
    identity: str
    ids: NDArray[np.int64]
    text: Text
    imatrix: Path | None
    calibration: Path | None
    folder: Path = field(default_factory=Path)
    """For files that are needed until the release is done."""

    @property
    def release_imatrix(self) -> Path | None:
        """The importance matrix that is part of the release: the one that it collects."""
        return self.imatrix if self.request.imatrix_text is not None else None

    def outputs(self) -> tuple[Output, ...]:
        """The outputs of the request; the importance matrix is there by now."""
        return tuple(self._output(type) for type in self.request.types)

    def missing(self, elsewhere: Collection[Path] = ()) -> tuple[Output, ...]:
        """The outputs that are neither finished nor ``elsewhere``. Raises ``UsageError`` (``release.other``) for files
        in their way.
        """
        force, threads = self.request.run.force, self.request.run.threads
        left = (output for output in self.outputs() if output.path not in elsewhere)
        return tuple(output for output in left if output.finished(force=force, threads=threads) is None)

    def _output(self, type: str) -> Output:
        name = output_name(self.request.template, self.model, type)
        is_float = type in FLOAT_DTYPES
        options = WriteOptions(
            gguf=GGUFOptions(imatrix=self.imatrix if type not in packings.TYPES and not is_float else None),
            calibration=Calibration(text=None if is_float else self.calibration),
        )
        record = {
            RECORD: {
                "model": self.model,
                "type": type,
                "source": self.identity,
                "text": {
                    "name": self.text.name,
                    "sha256": self.text.sha256,
                    "windows": self.text.windows,
                    "length": self.text.length,
                },
            }
        }
        return Output(self.request.folder / name, type, options, record)

    def conversion(self, outputs: tuple[Output, ...]) -> ConversionRequest:
        """The request that writes some outputs in one pass, verified and measured on the text."""
        tokens = self.folder / "measured.npy"
        np.save(tokens, self.ids)
        return ConversionRequest(
            source=self.source,
            destination=outputs[0].path,
            outputs=tuple(output.request for output in outputs),
            checks=Checks(tokens=tokens),
            run=self.request.run,
        )

    def sentence(self) -> str:
        """What quality is measured on."""
        text = described(self.request.text)
        return f"{self.ids.size:,} tokens ({len(self.ids)} windows of {self.ids.shape[1]}) of {text}"


def check_request(request: ReleaseRequest) -> None:
    """Raises ``UsageError`` for what can be refused before the source is opened."""
    if not request.types:
        raise UsageError("type.missing", "--types names no type", hint="'gemma2tool formats' lists them")
    for type in request.types:
        check_type(format_of(type), type)
        if format_of(type) == "gguf":
            file_type(type)  # raises for an unknown one
    check_template(request.template, request.types)
    given = {
        "--imatrix": request.imatrix,
        "--imatrix-text": request.imatrix_text,
        "--calibration": request.calibration,
    }
    chosen = [option for option, value in given.items() if value is not None]
    if len(chosen) > 1:
        hint = f"leave out {chosen[1]}"
        raise UsageError("release.options", f"{chosen[0]} and {chosen[1]} both choose the codes", hint=hint)
    if request.tokens < 1:
        raise UsageError("release.text", "--tokens is less than one")
    if not request.run.receipt:
        raise UsageError("release.options", "a release needs receipts: they say what is finished")


def open_release(request: ReleaseRequest, source: Checkpoint, folder: Path) -> Release:
    """The release of an open source. ``folder``: for files that are needed meanwhile.

    Raises ``UsageError`` (``release.text``) for a text that has too few tokens.
    """
    path = text_file(request.text, "measurement", folder)
    ids = read_sequences(path, source, samples=ALL, length=None)
    count = min(math.ceil(request.tokens / ids.shape[1]), len(ids))
    ids = ids[np.linspace(0, len(ids) - 1, count).astype(np.int64)]
    if ids.size < request.tokens:
        raise UsageError(
            "release.text",
            f"{path}: has {ids.size:,} tokens in whole windows, and {request.tokens:,} are asked for",
            hint="give a longer text with --text, or fewer --tokens",
        )
    model = request.model or model_name(source)
    imatrix = request.imatrix
    if request.imatrix_text is not None:
        imatrix = request.folder / f"{model}.imatrix.gguf"
    calibration = None
    if request.calibration is not None:
        calibration = text_file(request.calibration, "calibration", folder)
    identity = source_identity(source)
    return Release(request, source, model, identity, ids, describe(path, ids), imatrix, calibration, folder)
